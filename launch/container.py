"""A run in a container of a machine that is ours alone: its command, and the shell text that starts it until it ends.

For machines that no cluster looks after (launch/gcloud.py, launch/sky.py).
"""

import shlex

from launch.job import PREEMPTED, WRONG_USE, Job

# Reads $name, $image_host, $max_restarts, and the arrays as_root and run.
_UNTIL_IT_ENDS = f"""
# Starts the run until no start should follow; returns the status of the last one.
until_it_ends() {{
  local faults=0 status pause
  if [ -n "$image_host" ]; then
    "${{as_root[@]}}" gcloud auth configure-docker "$image_host" --quiet
  fi
  while true; do
    "${{as_root[@]}}" docker rm --force "$name" > /dev/null 2>&1
    echo "launch: starts at $(date --utc +%FT%TZ), after $faults faults since the boot"
    "${{as_root[@]}}" "${{run[@]}}"
    status=$?
    case $status in
      0)
        echo 'launch: done'
        return 0
        ;;
      {WRONG_USE})
        echo 'launch: status {WRONG_USE}, wrong use, which no restart helps'
        return {WRONG_USE}
        ;;
      {PREEMPTED}) pause=15 ;;
      *)
        faults=$((faults + 1))
        if [ "$faults" -gt "$max_restarts" ]; then
          echo "launch: status $status, fault $faults; no restart is left of $max_restarts"
          return "$status"
        fi
        # All processes of the last start must have ended; they miss one that is gone after half a minute.
        pause=60
        ;;
    esac
    echo "launch: status $status; starts again in $pause s"
    sleep $pause
  done
}}
"""


def command(job: Job) -> list[str]:
    """docker's. The run is the first process of the container, and gets the SIGTERM of a machine that stops."""
    words = ["docker", "run", f"--name={job.name}", "--privileged", "--network=host"]
    words += [f"--stop-timeout={job.grace_seconds}", "--entrypoint=python", "--env=PYTHONUNBUFFERED=1"]
    words += [f"--env={name}={value}" for name, value in job.environment.items()]
    return [*words, job.image, *job.arguments]


def until_it_ends(job: Job, *, as_root: tuple[str, ...] = ()) -> str:
    """Text for bash, which defines a function of that name. as_root: before what only root may do."""
    host = job.image.partition("/")[0]
    lines = [
        f"name={shlex.quote(job.name)}",
        f"image_host={shlex.quote(host if host.endswith(('.pkg.dev', 'gcr.io')) else '')}",
        f"max_restarts={job.max_restarts}",
        f"as_root=({shlex.join(as_root)})",
        f"run=({shlex.join(command(job))})",
    ]
    return "\n".join(lines) + "\n" + _UNTIL_IT_ENDS
