# shellcheck shell=sh disable=SC2034
part=ledger
user=weighbridge-ledger
