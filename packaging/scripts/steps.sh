# shellcheck shell=sh disable=SC2154
# What deb and rpm do alike. DPKG_ROOT is empty but for `dpkg --root`.
: "${DPKG_ROOT:=}"

systemd_runs() {
    [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]
}

# Users and directories; then the modules are compiled, which needs a writable /var and may fail: they run without it, too.
prepare() {
    systemd-sysusers ${DPKG_ROOT:+--root="$DPKG_ROOT"} "weighbridge-$part.conf"
    systemd-tmpfiles ${DPKG_ROOT:+--root="$DPKG_ROOT"} --create "weighbridge-$part.conf"
    if [ -z "$DPKG_ROOT" ]; then
        forget_compiled
        "$python" -IS -X pycache_prefix="/var/cache/weighbridge/$part" -m compileall -q \
            --invalidation-mode checked-hash "/usr/lib/weighbridge/$part" || true
    fi
}

forget_compiled() {
    rm -rf "$DPKG_ROOT/var/cache/weighbridge/$part"
    rmdir "$DPKG_ROOT/var/cache/weighbridge" 2>/dev/null || true
}

# The state is usage that nobody has yet: it outlives a removal, and only a purge takes it.
purge() {
    rm -rf "$DPKG_ROOT/var/lib/$user" "$DPKG_ROOT/etc/weighbridge/$part.d"
    rmdir "$DPKG_ROOT/etc/weighbridge" 2>/dev/null || true
}
