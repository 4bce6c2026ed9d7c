# shellcheck shell=sh
case $1 in
    remove) forget_compiled ;;
    purge) purge ;;
esac
