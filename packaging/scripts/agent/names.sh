# shellcheck shell=sh disable=SC2034
part=agent
user=weighbridge
