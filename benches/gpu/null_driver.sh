# Builds null_driver.c as the libraries that a CUDA program links: null_driver.sh DIR
set -e
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
for name in libcuda.so.1 libcudart.so.13 libcublas.so.13 libcurand.so.10; do
  # Symbols of the toolkit's libraries have versions named like the library.
  version=
  case $name in
  libcuda.*) ;;
  *)
    echo "$name { global: *; };" >"$1/version"
    version=-Wl,--version-script=$1/version
    ;;
  esac
  cc -O2 -w -shared -fPIC $version -Wl,-soname,$name -o "$1/$name" "$here/null_driver.c"
done
