#!/usr/bin/env bash
# Make a small Debian to build the image on where the CUDA base cannot be pulled, as in tests.
# Needs root, debootstrap and a Docker engine. Usage: stand_in_base.sh NAME
set -euo pipefail
name=${1:?usage: stand_in_base.sh NAME}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase bookworm "$folder" > "$folder.log" 2>&1 \
  || { tail -n 20 "$folder.log" >&2; exit 1; }
rm -f "$folder.log"

# Whom this machine trusts, the build must trust as well: its network may inspect TLS. Under a name
# of its own, for installing certificates in the image writes the usual one anew.
changes=()
if [ -f /etc/ssl/certs/ca-certificates.crt ]; then
  cp -L /etc/ssl/certs/ca-certificates.crt "$folder/etc/host-ca.crt"
  changes=(--change "ENV PIP_CERT=/etc/host-ca.crt SSL_CERT_FILE=/etc/host-ca.crt")
fi
tar -C "$folder" -c . | docker import "${changes[@]}" - "$name"
