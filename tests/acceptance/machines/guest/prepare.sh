#!/bin/bash
# Sets the scene once, before the snapshot: a container image of nothing but busybox, and podman warmed up.
set -euo pipefail
root=$(mktemp -d)
mkdir -p "$root"/{bin,tmp,proc,sys,dev,etc}
for name in $(busybox --list); do ln -s busybox "$root/bin/$name"; done
rm -f "$root/bin/busybox"
cp /bin/busybox "$root/bin/"
tar -C "$root" -c . | podman import -q - localhost/busybox:1 >/dev/null
podman run --rm --network none localhost/busybox:1 true
rm -rf "$root"
sync
