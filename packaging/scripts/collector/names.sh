# shellcheck shell=sh disable=SC2034
part=collector
user=weighbridge-collector
