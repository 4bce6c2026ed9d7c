# shellcheck shell=sh
# On an upgrade the old daemon goes on until the new one is configured.
if [ "$1" = remove ] && systemd_runs; then end; fi
