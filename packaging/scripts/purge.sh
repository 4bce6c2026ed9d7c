# shellcheck shell=sh disable=SC2154
# The state is usage that nobody has yet: it outlives a removal, and only a purge takes it.
purge() {
    rm -rf "/var/lib/$user" "/etc/weighbridge/$part.d"
    rmdir /etc/weighbridge 2>/dev/null || true
}
