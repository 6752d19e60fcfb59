#!/bin/bash
# Boots the systemd of this host's /usr in a container on the tree $1, in the foreground, until it is gone: boot.sh TREE NAME
# The caller gives us mount and process namespaces of our own, the latter so that our end ends all that is inside.
set -euo pipefail
tree=$1 name=$2 top=/sys/fs/cgroup group=/sys/fs/cgroup/$2

# One pure hierarchy of cgroups, whatever the host has there.
while mountpoint -q $top; do umount --recursive --lazy $top; done
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 $top
for controller in cpu memory pids io; do echo +$controller > $top/cgroup.subtree_control || true; done 2>/dev/null
mkdir -p /run/systemd/nspawn
mount -t tmpfs -o mode=755 tmpfs /run/systemd/nspawn

sweep() {  # remove the groups that a container leaves behind
  [ -d "$group" ] || return 0
  echo 1 > "$group/cgroup.kill" || true
  for _ in {1..50}; do
    find "$group" -depth -type d -exec rmdir {} + || true
    [ -d "$group" ] || return 0
    sleep 0.1
  done
} 2>/dev/null
trap sweep EXIT
sweep
mkdir "$group"

# It can't look for systemd's version under the tree, whose /usr is empty until it is bound.
export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
(
  echo 0 > "$group/cgroup.procs"
  exec systemd-nspawn --quiet --boot --directory="$tree" --bind-ro=/usr --machine="$name" --hostname="$name" \
    --register=no --keep-unit --console=pipe --link-journal=no --resolv-conf=off --timezone=off
) &
wait $!
