# shellcheck shell=sh
prepare
