#!/usr/bin/env bash
# Run the image here as a cloud job runs it: not as root, on a read-only file system, with /scratch
# on a volume that stays, one for each user, as nobody can read another's. The current folder is /work, so paths below it mean the same inside.
#   scripts/run_local.sh train --config demo --data demo/data --run demo/run
set -euo pipefail

image=${IMAGE:-s4gan:latest}
docker=${DOCKER:-docker}

options=(
  --rm --init --read-only
  --user "$(id -u):$(id -g)"
  --volume "$PWD:/work"
  --volume "s4gan-scratch-$(id -u):/scratch"
  --shm-size 2g
  --stop-timeout 110
)
if [ -t 0 ] && [ -t 1 ]; then
  options+=(--interactive --tty)
fi
if nvidia-smi -L > /dev/null 2>&1; then
  options+=(--gpus all)
else
  echo "no GPU on this machine (nvidia-smi finds none): the container runs on the CPU" >&2
fi

# Names only, so that no value appears in a process list. A bundle of certificates is a path out here.
while IFS='=' read -r name _; do
  options+=(--env "$name")
done < <(env | grep -E '^(AWS|WANDB|S4GAN)_[A-Z0-9_]+=' | grep -vE '^(AWS_CA_BUNDLE|AWS_CONFIG_FILE|AWS_SHARED_CREDENTIALS_FILE|S4GAN_SCRATCH|S4GAN_HEARTBEAT)=')
if [ -d "$HOME/.aws" ]; then
  options+=(--volume "$HOME/.aws:/aws:ro" --env AWS_CONFIG_FILE=/aws/config --env AWS_SHARED_CREDENTIALS_FILE=/aws/credentials)
  # What `aws sso login` has left is looked for below the home folder only, and renewed there.
  if [ -d "$HOME/.aws/sso/cache" ]; then
    options+=(--volume "$HOME/.aws/sso/cache:/scratch/.aws/sso/cache")
  fi
fi
# A server on this machine's loopback is out of reach of a network of the container's own.
if [[ ${AWS_ENDPOINT_URL:-} =~ //(127\.|localhost) ]]; then
  options+=(--network host)
fi

exec "$docker" run "${options[@]}" "$image" "$@"
