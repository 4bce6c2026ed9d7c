#!/usr/bin/env bash
# Build a Debian root disk with two kernels, and the modules that reach the disk, from Debian packages only.
#   image.sh DIRECTORY          makes root.img, busybox, packages, and of each kernel, stable and backports,
#                               KERNEL/vmlinuz and KERNEL/modules/ (numbered in load order)
# Needs root, mmdebstrap, mke2fs. No loop device, no mount on this machine, no registry of images.
# Mirror and proxy are this machine's own apt configuration.
set -euo pipefail
directory=$1
here=$(dirname "$(readlink -f "$0")")
suite=bookworm
kernel=linux-image-cloud-amd64
disk_mib=4096
packages=systemd,systemd-sysv,dbus,udev,kmod,procps,iproute2,python3,podman,crun,conmon,busybox-static,bpftool,rpm
# The compiler of engine bcc, and what it compiles against: the headers of the stable kernel.
packages+=,python3-bpfcc,linux-headers-cloud-amd64

main=$("$here/mirror.sh" main)
security=$("$here/mirror.sh" security)
sources=("deb $main $suite main" "deb $main $suite-updates main" "deb $main $suite-backports main")
[ -z "$security" ] || sources+=("deb $security $suite-security main")
proxies=()
while read -r line; do proxies+=("--aptopt=$line"); done < <(apt-config dump | grep -i '^Acquire::https*::Proxy' || true)

root=$directory/root
mkdir -p "$directory"
trap 'rm -rf "$root"' EXIT
# INITRD=No: Debian's kernel package makes no initrd; ours is smaller and carries the guest's part of the rig.
INITRD=No mmdebstrap --quiet --mode=root --variant=minbase --format=directory --include="$packages,$kernel" \
    --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"' "${proxies[@]}" \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt=force-unsafe-io \
    --customize-hook="APT_CONFIG=\$MMDEBSTRAP_APT_CONFIG apt-get -qq -o DPkg::Chroot-Directory=\"\$1\" install $kernel/$suite-backports" \
    "$suite" "$root" "${sources[@]}" 2>&1 | grep -v '^[WN]:' >&2 || [ "${PIPESTATUS[0]}" = 0 ]

echo weighbridge-machine >"$root/etc/hostname"
printf '127.0.0.1 localhost weighbridge-machine\n::1 localhost\n' >"$root/etc/hosts"
echo '/dev/vda / ext4 defaults,noatime 0 0' >"$root/etc/fstab"
tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
mkdir -p "$root/etc/systemd/system.conf.d" "$root/etc/systemd/journald.conf.d"
# Emulation is slow: nothing in here is late before five minutes.
printf '[Manager]\nDefaultTimeoutStartSec=300s\nDefaultDeviceTimeoutSec=300s\n' >"$root/etc/systemd/system.conf.d/machine.conf"
printf '[Journal]\nStorage=volatile\nRateLimitBurst=0\n' >"$root/etc/systemd/journald.conf.d/machine.conf"
echo virtio_console >"$root/etc/modules-load.d/machine.conf"
systemctl --root="$root" -q set-default multi-user.target
# No background chores: what runs in a machine is what a test started.
systemctl --root="$root" -q mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer systemd-pstore.service systemd-timesyncd.service getty@tty1.service \
    serial-getty@ttyS0.service podman.service podman.socket podman-auto-update.timer podman-restart.service
rm -f "$root"/etc/cni/net.d/87-podman-bridge.conflist

take_kernel() { # what is needed to boot one: VERSION into DIRECTORY
    local version=$1 to=$2 number=100 module verb path name
    mkdir -p "$to/modules"
    cp "$root/boot/vmlinuz-$version" "$to/vmlinuz"
    chroot "$root" depmod "$version"
    for module in virtio_pci virtio_blk crc32c_generic ext4; do
        while read -r verb path _; do
            name=$(basename "$path" .xz)
            if [ "$verb" = insmod ] && ! compgen -G "$to/modules/*-$name" >/dev/null; then
                xzcat -f "$root$path" >"$to/modules/$number-$name" # passes on what is not compressed
                number=$((number + 1))
            fi
        done < <(chroot "$root" modprobe -S "$version" --show-depends "$module")
    done
}
for version in "$root"/lib/modules/*; do
    version=${version##*/}
    case $version in
        6.1.*) take_kernel "$version" "$directory/stable" ;;
        *) take_kernel "$version" "$directory/backports" ;;
    esac
done
cp "$root/bin/busybox" "$directory/busybox"
chroot "$root" dpkg-query -W >"$directory/packages"
rm -rf "${root:?}"/boot/* "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
mke2fs -q -t ext4 -O ^has_journal -E lazy_itable_init=1,root_owner=0:0 -m 0 -d "$root" "$directory/root.img" "${disk_mib}M" >/dev/null
