#!/usr/bin/env bash
# What the images are built on where there is no registry, and later no network:
#   base.sh DIRECTORY PACKAGE ...    makes root.tar and archive/
# root.tar is a Debian without what its image "bookworm-slim" goes without, too. The only repository that it knows is /archive:
# the packages named and all that they need of Debian. Needs root, mmdebstrap, apt-ftparchive.
set -euo pipefail
directory=$1
shift
here=$(dirname "$(readlink -f "$0")")
suite=bookworm
export archive=$directory/archive packages="$*"
mkdir -p "$archive"

main=$("$here/../acceptance/machines/mirror.sh" main)
security=$("$here/../acceptance/machines/mirror.sh" security)
sources=("deb $main $suite main" "deb $main $suite-updates main")
[ -z "$security" ] || sources+=("deb $security $suite-security main")
proxies=()
while read -r line; do proxies+=("--aptopt=$line"); done < <(apt-config dump | grep -i '^Acquire::https*::Proxy' || true)

# Nothing of this machine stays in the base: neither its mirror nor its proxy.
# shellcheck disable=SC2016 # mmdebstrap's hooks are shell programs of their own, $1 is the root
mmdebstrap --quiet --mode=root --variant=minbase --format=tar \
    --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"' "${proxies[@]}" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/info/*' --dpkgopt='path-exclude=/usr/share/lintian/*' --dpkgopt=force-unsafe-io \
    --customize-hook='rm -f "$1"/var/cache/apt/archives/*.deb' \
    --customize-hook='APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get -qq -o DPkg::Chroot-Directory="$1" --download-only install $packages' \
    --customize-hook='cp "$1"/var/cache/apt/archives/*.deb "$archive"' \
    --customize-hook='rm -f "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/apt/sources.list.d/* "$1"/etc/resolv.conf "$1"/etc/hostname' \
    --customize-hook='echo "deb [trusted=yes] file:/archive ./" >"$1/etc/apt/sources.list"' \
    "$suite" "$directory/root.tar" "${sources[@]}" 2>&1 | grep -v '^[WN]:' >&2 || [ "${PIPESTATUS[0]}" = 0 ]

(cd "$archive" && apt-ftparchive packages . >Packages)
chmod -R u=rwX,go=rX "$archive"
