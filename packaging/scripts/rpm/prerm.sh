# shellcheck shell=sh
# rpm counts the versions that will be left: none, when this is no upgrade.
if [ "$1" -eq 0 ] && systemd_runs; then
    end
fi
