# shellcheck shell=sh
# rpm says how many versions will be left: none, when this is no upgrade.
if [ "$1" -eq 0 ] && systemd_runs; then end; fi
