#!/usr/bin/env bash
# The Debian mirror that this machine's apt uses:  mirror.sh main|security
# A machine that is not Debian names one in WEIGHBRIDGE_DEBIAN_MIRROR. `security` may be empty: there may be none.
set -euo pipefail
named=${WEIGHBRIDGE_DEBIAN_MIRROR:-}
if [ -z "$named" ]; then
    # shellcheck disable=SC2016 # apt fills these in
    sites=$(apt-get indextargets --format '$(SITE) $(ORIGIN)' 'Created-By: Packages' 2>/dev/null |
        awk '$2 == "Debian" || $1 ~ /\/debian(-security)?\/?$/ { print $1 }' | sort -u)
else
    sites=$named
fi
case $1 in
    main) printf '%s\n' "$sites" | grep -v security | head -n 1 | grep . ||
        { echo "apt here knows no Debian mirror: name one in WEIGHBRIDGE_DEBIAN_MIRROR" >&2; exit 1; } ;;
    security) printf '%s\n' "$sites" | grep security | head -n 1 || true ;;
esac
