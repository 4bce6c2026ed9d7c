#!/usr/bin/env bash
# Unpack a QEMU with everything it links into DIRECTORY; nothing is installed and no root is needed.
#   qemu.sh DIRECTORY
# Debian 12 ships 7.2, whose software emulation corrupts flags under newer guest kernels: 10 is in its backports.
# Mirror, proxy and credentials are this machine's own apt configuration; only its lists and cache are private.
set -euo pipefail
directory=$1
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
# shellcheck source=/dev/null
suite=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
mirror=$("$(dirname "$0")/mirror.sh" main)
from=$suite
[ "$suite" != bookworm ] || from=bookworm-backports

private=$directory/apt
mkdir -p "$private"/{lists/partial,cache/archives/partial}
printf 'deb [signed-by=%s] %s %s main\n' $keyring "$mirror" "$suite" $keyring "$mirror" "$from" | sort -u >"$private/sources.list"
options=(-qq -o "Dir::Etc::sourcelist=$private/sources.list" -o Dir::Etc::sourceparts=/nonexistent
    -o "Dir::State::lists=$private/lists" -o "Dir::Cache=$private/cache" -o APT::Sandbox::User=root -o Debug::NoLocking=1)
apt-get "${options[@]}" update
# What apt would install is what this machine lacks.
apt-get "${options[@]}" -y --no-install-recommends --reinstall --download-only -t "$from" install \
    qemu-system-x86 qemu-system-common qemu-system-data qemu-utils seabios
for package in "$private"/cache/archives/*.deb; do dpkg-deb -x "$package" "$directory"; done
rm -rf "$private"

# The directory may be moved: everything is found from where the wrapper lies.
wrapper() {   # TOOL [OPTION ...]
    cat >"$directory/$1" <<TXT
#!/bin/sh
here=\$(dirname "\$(readlink -f "\$0")")
libraries=\$here/usr/lib/x86_64-linux-gnu
export LD_LIBRARY_PATH="\$libraries:\$here/lib/x86_64-linux-gnu" QEMU_MODULE_DIR="\$libraries/qemu"
exec "\$here/usr/bin/$1" ${*:2} "\$@"
TXT
    chmod 755 "$directory/$1"
}
wrapper qemu-img
# shellcheck disable=SC2016 # expanded by the wrapper
wrapper qemu-system-x86_64 -L '"$here/usr/share/qemu"' -L '"$here/usr/share/seabios"'
rm -rf "$directory"/usr/share/{doc,man,lintian,applications}
