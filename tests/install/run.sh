#!/usr/bin/env bash
# usage: run.sh CASE PREFIX LIBDIR WORKDIR: one consumer of the tree installed under PREFIX.
set -euo pipefail
case_name=$1 prefix=$2 libdir=$3 work=$4
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cc=${CC:-cc}
library=$prefix/$libdir/libadaattn.so

# pkg_config_consumer PREFIX: compiles, links and runs with nothing but what pkg-config says.
pkg_config_consumer() {
  local flags
  export PKG_CONFIG_PATH=$1/$libdir/pkgconfig
  read -ra flags < <(pkg-config --cflags --libs adaattn)
  "$cc" -std=c11 -Wall -Wextra -Werror -pedantic "$here/consumer.c" -o "$work/pkg_config_consumer" "${flags[@]}"
  LD_LIBRARY_PATH=$1/$libdir "$work/pkg_config_consumer"
}

case $case_name in
  PkgConfigConsumer) pkg_config_consumer "$prefix" ;;
  MovedTreeConsumer)
    rm -rf "$work/moved"
    cp -a "$prefix" "$work/moved"
    pkg_config_consumer "$work/moved"
    rm -rf "$work/moved"
    ;;
  DlopenConsumer)
    "$cc" -std=c11 -Wall -Wextra -Werror "$here/dlopen.c" -o "$work/dlopen_consumer" -ldl
    "$work/dlopen_consumer" "$library"
    ;;
  SonameAndLinks)
    [[ -L $library && -L $prefix/$libdir/libadaattn.so.0 ]]
    readelf -d "$library" | grep 'SONAME.*\[libadaattn.so.0\]'
    if readelf -d "$library" | grep -E 'RPATH|RUNPATH'; then exit 1; fi
    ;;
  NeedsOnlyLibc)
    needed=$(readelf -d "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
    echo "NEEDED: ${needed//$'\n'/ }"
    if grep -vxE 'libc\.so\.6|libm\.so\.6|ld-linux-.*\.so\.[0-9]+' <<<"$needed"; then exit 1; fi
    ;;
  LoadsOnGlibc235)
    # Releases are built on Debian 12; a library built on a newer system binds to that system's symbol versions.
    built_on=$(getconf GNU_LIBC_VERSION | cut -d ' ' -f 2)
    if [[ $(printf '%s\n2.36\n' "$built_on" | sort -V | tail -n 1) != 2.36 ]]; then
      echo "Skipped: built on glibc $built_on, asserted for builds on glibc 2.36 or older"
      exit 77
    fi
    newest=$(objdump -T "$library" | grep -oE 'GLIBC_[0-9.]+' | sort -Vu | tail -n 1)
    echo "newest symbol version: $newest"
    [[ $(printf '%s\nGLIBC_2.35\n' "$newest" | sort -V | tail -n 1) == GLIBC_2.35 ]]
    ;;
  *) exit 64 ;;
esac
