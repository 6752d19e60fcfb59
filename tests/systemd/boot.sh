#!/bin/bash
# boot.sh TREE NAME: boots the systemd of this host's /usr in a container on a tree, and runs until the container ends.
# The caller runs it in new mount and process namespaces, so that all processes of the container end with this script.
set -euo pipefail
tree=$1 name=$2 top=/sys/fs/cgroup group=/sys/fs/cgroup/$2

# Use the unified cgroup hierarchy even if the host does not.
while mountpoint -q $top; do umount --recursive --lazy $top; done
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 $top
for controller in cpu memory pids io; do echo +$controller > $top/cgroup.subtree_control || true; done 2>/dev/null
mkdir -p /run/systemd/nspawn
mount -t tmpfs -o mode=755 tmpfs /run/systemd/nspawn

remove_cgroups() {  # a container leaves its cgroups behind
  [ -d "$group" ] || return 0
  echo 1 > "$group/cgroup.kill" || true
  for _ in {1..50}; do
    find "$group" -depth -type d -exec rmdir {} + || true
    [ -d "$group" ] || return 0
    sleep 0.1
  done
} 2>/dev/null
trap remove_cgroups EXIT
remove_cgroups
mkdir "$group"

# nspawn cannot read the version of systemd from the tree, because its /usr is empty until the bind mount.
export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
(
  echo 0 > "$group/cgroup.procs"
  exec systemd-nspawn --quiet --boot --directory="$tree" --bind-ro=/usr --machine="$name" --hostname="$name" \
    --register=no --keep-unit --console=pipe --link-journal=no --resolv-conf=off --timezone=off
) &
wait $!
