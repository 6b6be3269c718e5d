#!/usr/bin/env bash
# Ends the cluster that slurm/testbed/up.sh started in DIR, with its jobs. Only processes recorded in DIR are stopped.
set -uo pipefail
dir=$(cd "${1:?usage: down.sh DIR}" && pwd) || exit 1
export SLURM_CONF=$dir/etc/slurm.conf

jobs=$(timeout 5 squeue -h -o %A 2>/dev/null | sort -u | tr '\n' ' ')
# shellcheck disable=SC2086  # several numbers
[ -z "$jobs" ] || timeout 5 scancel $jobs
for _ in $(seq 80); do
    [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break
    sleep 0.1
done

shopt -s nullglob
end() {  # the daemons whose pid files are named, all at once
    local file pid pids=()
    for file in "$@"; do
        [ -s "$file" ] || continue
        pid=$(<"$file")
        # A number may be another's by now.
        if grep -qE 'slurm|munge' "/proc/$pid/comm" 2>/dev/null; then
            pids+=("$pid")
        fi
        rm -f "$file"
    done
    [ ${#pids[@]} -gt 0 ] || return
    kill "${pids[@]}" 2>/dev/null
    for _ in $(seq 50); do
        kill -0 "${pids[@]}" 2>/dev/null || return
        sleep 0.1
    done
    kill -9 "${pids[@]}" 2>/dev/null
}
end "$dir"/run/slurmd.*.pid
end "$dir/run/slurmctld.pid"
end "$dir/run/munged.pid"
exit 0
