#!/usr/bin/env bash
# A real Slurm of four nodes on this machine, for tests: bash slurm/testbed/up.sh DIR, then `eval` what it prints.
# Everything listens on loopback and lies in DIR; slurm/testbed/down.sh DIR ends it. Needs root, munge and slurm-wlm.
set -euo pipefail
dir=$(mkdir -p "${1:?usage: up.sh DIR}" && cd "$1" && pwd)
nodes=${VERNIER_TESTBED_NODES:-4}
port=${VERNIER_TESTBED_PORT:-17000}
here=$(hostname -s)

for command in munged slurmctld slurmd; do
    command -v "$command" >/dev/null || { echo "$command is missing: apt-get install slurm-wlm munge" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "slurmd starts jobs as other users: run this as root" >&2; exit 1; }
[ ! -s "$dir/run/slurmctld.pid" ] || { echo "$dir: a cluster is up there; down.sh ends it" >&2; exit 1; }

mkdir -p "$dir"/{etc,log,run,state,munge}
chmod 755 "$dir"/{etc,log,run,state}
chmod 711 "$dir/munge"
[ -s "$dir/munge/key" ] || { (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key"); }

cat >"$dir/etc/slurm.conf" <<CONF
ClusterName=testbed
SlurmctldHost=$here(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job may not start before its credential has expired: two minutes, unless it is told otherwise.
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort=$port
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmdSpoolDir=$dir/spool.%n
StateSaveLocation=$dir/state
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmctldTimeout=10
SlurmdTimeout=${VERNIER_TESTBED_TIMEOUT:-5}
InactiveLimit=0
KillWait=3
MinJobAge=3600
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.txt
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
FirstJobId=${VERNIER_TESTBED_FIRST_JOB:-1}
MaxArraySize=1001
EnforcePartLimits=ALL
GresTypes=gpu
NodeName=node[1-$nodes] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=8 Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=2880 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP
CONF
# GPUs in name only: what slurmd counts must be there as device files.
mkdir -p "$dir/dev"
for n in $(seq 0 7); do [ -e "$dir/dev/gpu$n" ] || mknod "$dir/dev/gpu$n" c 1 3; done
printf 'AutoDetect=off\nName=gpu File=%s/dev/gpu[0-7]\n' "$dir" >"$dir/etc/gres.conf"
export SLURM_CONF=$dir/etc/slurm.conf

munged --force --key-file="$dir/munge/key" --socket="$dir/run/munge.sock" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" 2>>"$dir/log/up.log"

wait_until() {  # what, for how many tenths of a second, and the test
    local what=$1 tenths=$2
    shift 2
    for _ in $(seq "$tenths"); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.1
    done
    echo "$what did not come up; see $dir/log" >&2
    bash "$(dirname "${BASH_SOURCE[0]}")/down.sh" "$dir" >&2
    exit 1
}
answers() { timeout 5 scontrol ping | grep -q 'is UP'; }
are_idle() { [ "$(timeout 5 sinfo -h -N -t idle -p main | wc -l)" = "$nodes" ]; }
can_munge() { munge -S "$dir/run/munge.sock" -n </dev/null; }

wait_until munged 50 can_munge
slurmctld -c -f "$SLURM_CONF"
wait_until slurmctld 100 answers
for n in $(seq "$nodes"); do
    mkdir -p "$dir/spool.node$n"
    slurmd -N "node$n" -f "$SLURM_CONF"
done
wait_until "one of $nodes slurmd" 300 are_idle
printf 'export SLURM_CONF=%q\n' "$SLURM_CONF"
