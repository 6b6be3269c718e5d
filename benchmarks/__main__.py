"""`python -m benchmarks`: all benchmarks that need no GPU, one after the other."""

from benchmarks import scoring, startup, step_loop

for benchmark in (startup, step_loop, scoring):
    print(f"\n{(benchmark.__doc__ or '').splitlines()[0]}", flush=True)
    benchmark.main()
