# shellcheck shell=sh
# rpm knows no purge: the state stays.
if [ "$1" -eq 0 ]; then forget_compiled; fi
