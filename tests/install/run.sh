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
  "$cc" -std=c11 -Wall -Wextra -Werror -pedantic "$here/consumer.c" -o "$work/$case_name" "${flags[@]}"
  LD_LIBRARY_PATH=$1/$libdir "$work/$case_name"
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
    "$cc" -std=c11 -Wall -Wextra -Werror "$here/dlopen.c" -o "$work/$case_name" -ldl
    "$work/$case_name" "$library"
    ;;
  LinkedAndWithoutRunPath)
    [[ -L $library && -L $library.0 ]]
    if readelf -d "$library" | grep -E 'RPATH|RUNPATH'; then exit 1; fi
    ;;
  *) exit 64 ;;
esac
