# gcloud compute tpus queued-resources create llama --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --node-count=2 --node-prefix=llama --spot --scopes=https://www.googleapis.com/auth/cloud-platform --metadata-from-file=startup-script=/dev/stdin --zone=us-east5-a --project=project
# gcloud compute tpus queued-resources describe llama --zone=us-east5-a --project=project
# gcloud compute tpus queued-resources list --zone=us-east5-a --project=project
# gcloud compute tpus tpu-vm ssh llama-0 --worker=0 --command=tail -n 100 -F /var/log/t5x_like-llama.log --zone=us-east5-a --project=project
# gcloud compute tpus queued-resources delete llama --force --quiet --zone=us-east5-a --project=project
#!/bin/bash
exec >> /var/log/t5x_like-llama.log 2>&1
keep=
delete=(compute tpus queued-resources delete llama --force)
name=llama
image_host=us-docker.pkg.dev
max_restarts=3
as_root=()
run=(docker run --name=llama --privileged --network=host --stop-timeout=25 --entrypoint=python --env=PYTHONUNBUFFERED=1 '--env=NAME=it'"'"'s' us-docker.pkg.dev/project/images/t5x_like:1 -m t5x_like train --config=configs/pretrain/tiny.py --workdir=gs://bucket/runs/llama)

# Starts the run until no start should follow; returns the status of the last one.
until_it_ends() {
  local faults=0 status pause
  if [ -n "$image_host" ]; then
    "${as_root[@]}" gcloud auth configure-docker "$image_host" --quiet
  fi
  while true; do
    "${as_root[@]}" docker rm --force "$name" > /dev/null 2>&1
    echo "launch: starts at $(date --utc +%FT%TZ), after $faults faults since the boot"
    "${as_root[@]}" "${run[@]}"
    status=$?
    case $status in
      0)
        echo 'launch: done'
        return 0
        ;;
      2)
        echo 'launch: status 2, wrong use, which no restart helps'
        return 2
        ;;
      75) pause=15 ;;
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
}

until_it_ends
[ -n "$keep" ] && exit 0
sleep 120
metadata() {
  curl --silent --fail --header 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/$1"
}
# TPUs cost until they are deleted, so one failure of the network must not be the end of it.
until zone=$(metadata instance/zone) && project=$(metadata project/project-id) &&
  gcloud "${delete[@]}" --zone="${zone##*/}" --project="$project" --quiet; do
  echo 'launch: the TPUs are not deleted and cost on; tries again in 60 s'
  sleep 60
done
