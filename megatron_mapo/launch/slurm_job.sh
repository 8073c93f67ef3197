# Functions of the Slurm batch scripts, which set the variables below and then source this file. docs/slurm.md tells
# the order of events. Nothing here depends on a rank's number, on the folder of submission, or on a fixed port.
#
#   MAPO_CONFIG             YAML file of the run
#   MAPO_LAYOUT             disaggregated: the last MAPO_SERVER_NODES nodes serve, the others train
#                           colocated: every node does both; servers take the GPUs that its trainers leave
#                           (a heterogeneous job needs neither: component 0 trains, component 1 serves)
#   MAPO_SERVER_NODES       nodes with servers (disaggregated)
#   MAPO_TRAINERS_PER_NODE  trainer ranks of a node; empty: one a GPU that its servers leave
#   MAPO_RESTARTS           how often trainers that crashed are started again within the job
#   MAPO_START_TIMEOUT      seconds until the configuration is read, and then until the servers of all nodes answer
#   MAPO_TRAIN_PYTHON, MAPO_SERVE_PYTHON  interpreters, as the nodes (or the container) see them; empty: the checkout's
#                           .venv if it has one, python3 otherwise and in a container
#   MAPO_CONTAINER          empty, pyxis:IMAGE or apptainer:IMAGE
#   MAPO_WORKDIR            folder that relative paths of the run start from; empty: MAPO_REPO
#   MAPO_MOUNTS             mounts of the container, SOURCE:TARGET separated by commas
#   MAPO_INTERFACE          network interface whose addresses servers and trainers use; empty: the nodes find out

MAPO_PREEMPTED=75 # megatron_mapo.errors.Preempted
MAPO_TASK=megatron_mapo.launch.slurm_task
MAPO_ASKED=       # the signal that asked this job to end
MAPO_BEGUN=       # set once trainers were started
MAPO_CHECK_PID=
MAPO_SERVERS_PID=
MAPO_TRAINERS_PID=
MAPO_TEE_PID= # writes job.log

# A task of a job array by its own name: the SLURM_JOB_ID of one of them is that of the whole array.
MAPO_JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
: "${MAPO_JOB:=${SLURM_JOB_ID:-}}"

mapo_say() { printf '%(%FT%T)T %s\n' -1 "$*"; }

# Arguments without secrets: megatron_mapo.launch.arguments.hidden.
mapo_hidden() {
  sed -E "s/((api_?key|token|password|secret)[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^ ,}]+)/\1***/Ig; \
s|://[^ /@]+@|://***@|g" <<<"$*"
}

mapo_fail() { # EXIT_CODE TEXT
  mapo_say "error: $2" >&2
  exit "$1"
}

# ------------------------------------------------------------------------------------------------------- settings

mapo_settings() {
  local python=${MAPO_REPO:-}/.venv/bin/python
  if [ -n "${MAPO_CONTAINER:-}" ] || [ ! -x "$python" ]; then python=python3; fi
  : "${MAPO_LAYOUT:=disaggregated}" "${MAPO_SERVER_NODES:=1}" "${MAPO_TRAINERS_PER_NODE:=0}" "${MAPO_RESTARTS:=0}"
  : "${MAPO_START_TIMEOUT:=1800}"
  : "${MAPO_TRAIN_PYTHON:=$python}" "${MAPO_SERVE_PYTHON:=$MAPO_TRAIN_PYTHON}" "${MAPO_CONTAINER:=}" "${MAPO_MOUNTS:=}"
  export MAPO_INTERFACE=${MAPO_INTERFACE:-}
  [ -n "$MAPO_JOB" ] || mapo_fail 2 "this is not a Slurm job: submit the script with sbatch"
  [[ $MAPO_LAYOUT =~ ^(disaggregated|colocated)$ ]] || mapo_fail 2 "MAPO_LAYOUT must be disaggregated or colocated"
  [[ $MAPO_CONTAINER =~ ^((pyxis|apptainer):.+)?$ ]] ||
    mapo_fail 2 "MAPO_CONTAINER must be empty, pyxis:IMAGE or apptainer:IMAGE"
  cd "${MAPO_WORKDIR:-$MAPO_REPO}" || exit 2
  # Made for this job unless servers of others ask for theirs, and passed through the environment only: command lines
  # are visible to every user.
  : "${MAPO_API_KEY:=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')}"
  export MAPO_API_KEY
  export PYTHONUNBUFFERED=1 # what a component prints is in its log at once
}

mapo_hostnames() { scontrol show hostnames "$1" | paste -sd ' '; }

# Sets TRAINER_NODES and SERVER_NODES (names), and the het-group flag of each.
mapo_nodes() {
  TRAINER_GROUP=() SERVER_GROUP=()
  if [ -n "${SLURM_HET_SIZE:-}" ]; then
    [ "$SLURM_HET_SIZE" -eq 2 ] ||
      mapo_fail 2 "a heterogeneous job needs 2 components (trainers, servers), not $SLURM_HET_SIZE"
    TRAINER_NODES=$(mapo_hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0")
    SERVER_NODES=$(mapo_hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")
    TRAINER_GROUP=(--het-group=0) SERVER_GROUP=(--het-group=1) MAPO_LAYOUT=hetjob
    MAPO_NODES="$TRAINER_NODES $SERVER_NODES"
  else
    MAPO_NODES=$(mapo_hostnames "$SLURM_JOB_NODELIST")
    TRAINER_NODES=$MAPO_NODES SERVER_NODES=$MAPO_NODES
    if [ "$MAPO_LAYOUT" = disaggregated ]; then
      local nodes trainers
      read -ra nodes <<<"$MAPO_NODES"
      trainers=$((${#nodes[@]} - MAPO_SERVER_NODES))
      [ "$trainers" -ge 1 ] ||
        mapo_fail 2 "the job has ${#nodes[@]} node(s), and MAPO_SERVER_NODES=$MAPO_SERVER_NODES leaves none for trainers: \
ask for more (--nodes), or set MAPO_LAYOUT=colocated"
      TRAINER_NODES=${nodes[*]:0:trainers} SERVER_NODES=${nodes[*]:trainers}
    fi
  fi
  export MAPO_NODES
}

# ------------------------------------------------------------------------------------------------------ job steps

# mapo_step NODES TASKS_PER_NODE SRUN_FLAG... -- COMMAND...: become one job step on these nodes.
mapo_step() {
  local nodes=$1 per_node=$2 count flags=() image=${MAPO_CONTAINER#*:}
  count=$(wc -w <<<"$nodes")
  shift 2
  while [ "$1" != -- ]; do
    flags+=("$1")
    shift
  done
  shift
  # The steps of a job share its nodes, with all CPUs, memory and GPUs of the job: --overlap, --mem=0, no binding.
  if [ -n "${SLURM_GPUS_PER_TASK:-}" ]; then flags+=(--gpus-per-node="$SLURM_GPUS_ON_NODE"); fi
  unset SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_GPU_BIND
  flags+=(--overlap --mem=0 --overcommit --cpu-bind=none --export=ALL --nodelist="${nodes// /,}"
    --nodes="$count" --ntasks="$((count * per_node))" --ntasks-per-node="$per_node")
  case $MAPO_CONTAINER in
    pyxis:*) flags+=(--container-image="$image" --container-workdir="$PWD"
      --container-mounts="$PWD:$PWD${MAPO_MOUNTS:+,$MAPO_MOUNTS}") ;;
    apptainer:*) set -- apptainer exec --nv --pwd "$PWD" --bind "$PWD${MAPO_MOUNTS:+,$MAPO_MOUNTS}" "$image" "$@" ;;
  esac
  exec srun "${flags[@]}" "$@"
}

# Reads the configuration on the first trainer node, with the trainers' interpreter. Sets MAPO_LOGS, and
# MAPO_TRAINERS_PER_NODE if that was left to the node's GPUs.
mapo_check() {
  local node=${TRAINER_NODES%% *} since=$SECONDS out code folder
  out=$(mktemp) || exit 2
  mapo_step "$node" 1 "${TRAINER_GROUP[@]}" -- "$MAPO_TRAIN_PYTHON" -m "$MAPO_TASK" check \
    --nodes "$(wc -w <<<"$TRAINER_NODES")" --trainers "$MAPO_TRAINERS_PER_NODE" --layout "$MAPO_LAYOUT" \
    --start-timeout "$MAPO_START_TIMEOUT" -- "${MAPO_RUN[@]}" >"$out" &
  MAPO_CHECK_PID=$!
  while mapo_alive "$MAPO_CHECK_PID"; do
    mapo_heed
    mapo_in_time "$since" 1 "$node has not read the configuration"
    mapo_nap
  done
  wait "$MAPO_CHECK_PID"
  code=$?
  read -r MAPO_TRAINERS_PER_NODE folder < <(tail -n 1 "$out")
  rm "$out"
  if [ "$code" -ne 0 ]; then
    mapo_heed
    exit "$code"
  fi
  MAPO_LOGS=$folder/logs/slurm-$MAPO_JOB.${SLURM_RESTART_COUNT:-0}
  mkdir -p "$MAPO_LOGS" || exit 2
  exec > >(mapo_tee job.log) 2>&1
  MAPO_TEE_PID=$!
}

mapo_start_servers() {
  local skip=0
  [ "$MAPO_LAYOUT" = colocated ] && skip=$MAPO_TRAINERS_PER_NODE
  mapo_say "starting servers on $SERVER_NODES"
  MAPO_SERVERS_FROM=$(($(cat "$MAPO_LOGS/servers.log" 2>/dev/null | wc -c) + 1))
  # The servers of one node may end without the others'.
  mapo_step "$SERVER_NODES" 1 "${SERVER_GROUP[@]}" --label --kill-on-bad-exit=0 --wait=0 -- \
    "$MAPO_SERVE_PYTHON" -m "$MAPO_TASK" serve --logs "$MAPO_LOGS" --trainers "$skip" -- "${MAPO_RUN[@]}" \
    >>"$MAPO_LOGS/servers.log" 2>&1 &
  MAPO_SERVERS_PID=$!
}

# What the servers that were started last have printed.
mapo_servers_said() { tail -c "+$MAPO_SERVERS_FROM" "$MAPO_LOGS/servers.log"; }

# Slurm's signals go to every process of the script too; what is said afterwards must still arrive.
mapo_tee() {
  trap '' TERM USR1
  exec tee -a "$MAPO_LOGS/$1"
}

mapo_alive() { [ -n "$1" ] && kill -0 "$1" 2>/dev/null; }

# Server nodes whose `slurm_task serve` has not said that its servers answer. Lines begin with a task's number.
mapo_missing() {
  mapo_servers_said | awk -F ': *' -v nodes="$SERVER_NODES" '
    $2 ~ /^servers of / { task[substr($2, 12)] = $1 }
    /: *rollout\.urls=\[.*\]$/ { answers[$1] }
    END {
      count = split(nodes, node, " ")
      for (i = 1; i <= count; i++) if (!(node[i] in task && task[node[i]] in answers)) print node[i]
    }' | paste -sd ' '
}

# Until every node's servers answer. Sets MAPO_URLS.
mapo_wait_for_servers() {
  local missing since=$SECONDS said=$SECONDS
  while :; do
    mapo_heed
    missing=$(mapo_missing)
    [ -n "$missing" ] || break
    # srun goes on while any node's servers do, and names a task that ended: `n3: task 1: Exited with exit code 5`.
    if ! mapo_alive "$MAPO_SERVERS_PID" || mapo_servers_said | grep -q '^srun: error: .*: tasks\? [0-9,-]*: '; then
      tail -n 30 "$MAPO_LOGS/servers.log"
      mapo_fail 5 "the servers did not come up; see above and $MAPO_LOGS"
    fi
    mapo_in_time "$since" 5 "the servers of $missing did not answer"
    if [ $((SECONDS - said)) -ge 15 ]; then
      said=$SECONDS
      mapo_say "waiting for servers, those of $missing"
    fi
    mapo_nap
  done
  MAPO_URLS=$(mapo_servers_said | sed -n 's/^[0-9 ]*: *rollout\.urls=\[\(.*\)\]$/\1/p' | paste -sd,)
  mapo_say "servers answer: $MAPO_URLS"
}

# A node that hangs, in Slurm's prolog, with the container's image or on a file system, may be another one next time.
mapo_in_time() { # SINCE EXIT_CODE TEXT
  [ $((SECONDS - $1)) -lt "$MAPO_START_TIMEOUT" ] ||
    mapo_give_up "$2" "$3 within MAPO_START_TIMEOUT=$MAPO_START_TIMEOUT s"
}

# A signal ends `wait` at once, and then its trap runs; a foreground sleep would delay it.
mapo_nap() {
  sleep 1 &
  wait $!
}

# One life of the trainers. Sets MAPO_CODE: their exit code.
mapo_train() { # ATTEMPT
  local passed_on=-5
  mapo_say "starting $MAPO_TRAINERS_PER_NODE trainer rank(s) a node on $TRAINER_NODES"
  # Others get a minute after the first rank has ended: the one that knows the reason is not always the first.
  mapo_step "$TRAINER_NODES" "$MAPO_TRAINERS_PER_NODE" "${TRAINER_GROUP[@]}" --label --kill-on-bad-exit=0 --wait=60 -- \
    "$MAPO_TRAIN_PYTHON" -m "$MAPO_TASK" train --per-node "$MAPO_TRAINERS_PER_NODE" \
    --rendezvous "$MAPO_LOGS/rendezvous-$1" -- "${MAPO_RUN[@]}" "rollout.urls=[$MAPO_URLS]" \
    > >(mapo_tee trainers.log) 2>&1 &
  MAPO_TRAINERS_PID=$!
  MAPO_BEGUN=1
  while mapo_alive "$MAPO_TRAINERS_PID"; do
    if [ -n "$MAPO_SERVERS_PID" ] && ! mapo_alive "$MAPO_SERVERS_PID"; then
      MAPO_SERVERS_PID=
      tail -n 30 "$MAPO_LOGS/servers.log"
      mapo_say "the servers ended; waiting for the trainers to save and end (rollout.wait_timeout)"
    fi
    # More than once: srun has no use for a signal while it starts the tasks.
    if [ -n "$MAPO_ASKED" ] && [ $((SECONDS - passed_on)) -ge 5 ]; then
      passed_on=$SECONDS
      mapo_pass_on
    fi
    mapo_nap
  done
  wait "$MAPO_TRAINERS_PID"
  MAPO_CODE=$?
  MAPO_TRAINERS_PID=
  mapo_say "trainers ended with code $MAPO_CODE"
}

# ------------------------------------------------------------------------------------------------ signals and ends

mapo_on_signal() { # NAME
  MAPO_ASKED=$1
  mapo_say "SIG$1: asking the trainers to save and end after this step"
  mapo_pass_on
}

# srun passes it on to every rank, with or without a controller.
mapo_pass_on() {
  if mapo_alive "$MAPO_TRAINERS_PID"; then kill -USR1 "$MAPO_TRAINERS_PID"; fi
}

# Where no trainers run to be asked.
mapo_heed() { [ -z "$MAPO_ASKED" ] || mapo_give_up; }

# mapo_end VARIABLE: end the job step whose srun it names. SIGTERM makes srun kill all of its tasks.
mapo_end() {
  local pid=${!1} i
  printf -v "$1" ''
  mapo_alive "$pid" || return 0
  kill -TERM "$pid"
  for ((i = 0; i < 20; i++)); do
    mapo_alive "$pid" || return 0
    mapo_nap
  done
  mapo_say "job step of process $pid does not end; Slurm ends it with the job"
  kill -KILL "$pid"
}

mapo_cleanup() {
  trap '' USR1 TERM
  mapo_end MAPO_CHECK_PID
  mapo_end MAPO_TRAINERS_PID
  mapo_end MAPO_SERVERS_PID
}

# Whatever way the script ends. Slurm ends what it leaves behind; the last words must be in job.log by then.
mapo_leave() {
  local i
  mapo_cleanup
  exec >&- 2>&-
  for ((i = 0; i < 100; i++)); do
    mapo_alive "$MAPO_TEE_PID" || break
    sleep 0.1
  done
}

# The job goes back to the queue for a reason that its next start may meet as well. Two such starts in a row without a
# new checkpoint are an error: it would go round in circles. Before the configuration was read, nothing tells what the
# start before has done.
mapo_check_progress() { # EXIT_CODE TEXT
  local start=${SLURM_RESTART_COUNT:-0}
  if [ -n "${MAPO_LOGS:-}" ]; then
    cat "${MAPO_LOGS%/logs/*}/checkpoints/latest" >"$MAPO_LOGS/no-progress" 2>/dev/null
    cmp -s "$MAPO_LOGS/no-progress" "${MAPO_LOGS%.*}.$((start - 1))/no-progress" || return 0
  else
    [ "$start" -gt 0 ] || return 0
  fi
  mapo_fail "$1" "not for the first time, and without a new checkpoint in between: $2"
}

# The job goes back to the queue, unless Slurm is already ending it, because it was asked to end or for a reason of ours.
mapo_give_up() { # [EXIT_CODE TEXT]
  local state told= refused=0
  if [ $# -gt 0 ]; then
    mapo_say "$2"
  elif [ -z "$MAPO_BEGUN" ] && [ "$MAPO_ASKED" = USR1 ]; then
    set -- 1 "this job was asked to end before training began; --time must be longer than the lead of --signal plus the \
start of the servers"
  fi
  mapo_cleanup
  while :; do
    state=$(scontrol show job "$MAPO_JOB" 2>/dev/null | sed -n 's/^ *JobState=\([A-Z_]*\).*/\1/p;T;q')
    case $state in
      RUNNING)
        [ $# -eq 0 ] || mapo_check_progress "$@"
        scontrol requeue "$MAPO_JOB" && break
        refused=$((refused + 1))
        [ "$refused" -lt 5 ] || mapo_fail "$MAPO_PREEMPTED" "Slurm does not requeue this job (JobRequeue of slurm.conf, \
--no-requeue): submit it again, and it goes on from the last checkpoint"
        ;;
      '') [ -n "$told" ] || mapo_say "the Slurm controller does not answer; waiting to requeue" ;;
      *) exit "$MAPO_PREEMPTED" ;; # cancelled, timed out, or requeued by somebody else
    esac
    told=1
    mapo_nap
  done
  mapo_say "requeued: the job goes on from the last checkpoint"
  sleep 60 # Slurm ends this script
  exit "$MAPO_PREEMPTED"
}

# Whether starting the trainers again may help: they crashed, lost a server or hung; the configuration was fine.
mapo_may_retry() { [[ $1 =~ ^(1|5|6|12)$ ]] || [ "$1" -ge 128 ]; }

# Whether all of these nodes still start processes, be the container's image there or not.
mapo_answers() { # NODES SRUN_FLAG...
  local pid i
  MAPO_CONTAINER='' mapo_step "$1" 1 "${@:2}" -- true &
  pid=$!
  for ((i = 0; i < 60; i++)); do
    if ! mapo_alive "$pid"; then
      wait "$pid"
      return
    fi
    mapo_nap
  done
  kill -KILL "$pid"
  return 1
}

# After a crash, the last that MAPO_RESTARTS allows included. Slurm takes minutes to notice a dead node (SlurmdTimeout);
# until then new trainers would crash too.
mapo_await_nodes() {
  local i
  mapo_answers "$TRAINER_NODES" "${TRAINER_GROUP[@]}" && mapo_answers "$SERVER_NODES" "${SERVER_GROUP[@]}" && return
  mapo_say "a node does not answer; waiting for Slurm to requeue the job"
  for ((i = 0; i < 600 && !${#MAPO_ASKED}; i++)); do mapo_nap; done
  mapo_heed
  mapo_give_up "$MAPO_CODE" "the trainers ended with code $MAPO_CODE, and a node does not answer"
}

# The whole job.
mapo_run() { # section.key=value...
  local attempt
  mapo_settings
  mapo_nodes
  trap 'mapo_on_signal USR1' USR1
  trap 'mapo_on_signal TERM' TERM
  trap mapo_leave EXIT
  MAPO_RUN=(${MAPO_CONFIG:+--config "$MAPO_CONFIG"} "$@")
  mapo_say "job $MAPO_JOB: reading the configuration $(mapo_hidden "${MAPO_RUN[@]}")"
  mapo_check
  mapo_say "start $((${SLURM_RESTART_COUNT:-0} + 1)): trainers on $TRAINER_NODES; servers on $SERVER_NODES"
  mapo_say "logs of this start: $MAPO_LOGS"
  for ((attempt = 0; ; attempt++)); do
    if ! mapo_alive "$MAPO_SERVERS_PID"; then
      mapo_start_servers
      mapo_wait_for_servers
    fi
    mapo_heed
    mapo_train "$attempt"
    [ "$MAPO_CODE" -ne 0 ] || break
    if [ -n "$MAPO_ASKED" ] || [ "$MAPO_CODE" -eq "$MAPO_PREEMPTED" ]; then mapo_give_up; fi
    mapo_may_retry "$MAPO_CODE" || break
    mapo_await_nodes
    mapo_heed
    [ "$attempt" -lt "$MAPO_RESTARTS" ] || break
    mapo_say "starting the trainers again from the last checkpoint ($((attempt + 1)) of $MAPO_RESTARTS)"
  done
  mapo_cleanup
  if [ "$MAPO_CODE" -eq 0 ]; then mapo_say "done"; else mapo_say "failed with code $MAPO_CODE; see $MAPO_LOGS"; fi
  exit "$MAPO_CODE"
}

# A job of one command on its first node: `megatron-mapo` with these arguments. No run folder, no servers of its own.
mapo_command() {
  MAPO_LAYOUT=colocated
  mapo_settings
  mapo_nodes
  mapo_say "job $MAPO_JOB on ${MAPO_NODES%% *}: megatron-mapo $(mapo_hidden "$@")"
  mapo_step "${MAPO_NODES%% *}" 1 -- "$MAPO_TRAIN_PYTHON" -m megatron_mapo "$@"
}
