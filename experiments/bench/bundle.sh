#!/usr/bin/env bash
# Takes a built tree to a machine where nothing can be installed, a rented GPU say: unpacks the run-time packages, with
# what they need, into FOLDER (in the tree, to travel with it), where FOLDER/run runs a command with them.
#
#   here:    ./setup.sh && experiments/bench/bundle.sh bundle         needs apt-get, installs nothing
#   there:   bundle/run experiments/bench/gpu.sh out/gpu --data DIR    from the tree's folder
#
# There: x86-64, glibc 2.36 or newer.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ -e "$1" ] && { echo "$1 is there already" >&2; exit 2; }
mkdir -p "$1" && cd "$1"

packages=(luajit lua-busted lua-filesystem lua-cjson lua-argparse libjpeg62-turbo libpng16-16 libsndfile1 libsamplerate0
  libcairo2 fonts-dejavu-core libedit2 liblapack3 libzmq5 libssl3 libgomp1)
mapfile -t closure < <(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
  --no-replaces --no-enhances "${packages[@]}" | grep '^[a-z0-9]' | sed 's/:.*//' | sort -u)
# what every system has, or would be broken by another version of, stays out, and so do other fonts; names without a
# package fall away
system='lib(c6|c-bin|crypt1|gcc-s1)|gcc-.*|perl.*|debconf.*|cdebconf.*|dpkg|install-info|tar|ucf|lua5.[1-4]'
fonts='(fonts-[^d]|gsfonts|xfonts|x11|t1-).*|fonts-d[^e].*'
mapfile -t wanted < <(apt-cache show --no-all-versions "${closure[@]}" 2>/dev/null | sed -n 's/^Package: //p' |
  sort -u | grep -vE "^($system|$fonts)\$")
apt-get download -qq "${wanted[@]}"
for deb in *.deb; do dpkg -x "$deb" root && rm "$deb"; done
rm -rf root/usr/share/{doc,man,locale,lintian,bug}

cat >run <<'END'
#!/usr/bin/env bash
# Runs a command with the packages that lie in root/ beside this file.
here=$(cd "$(dirname "$0")" && pwd)/root
libraries=$here/usr/lib/x86_64-linux-gnu
found=$libraries:$libraries/blas:$libraries/lapack:$here/lib/x86_64-linux-gnu # Debian links the inner two at install
export LD_LIBRARY_PATH=$found${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LUA_PATH="./?.lua;$here/usr/share/lua/5.1/?.lua;$here/usr/share/lua/5.1/?/init.lua;;"
export LUA_CPATH="$libraries/lua/5.1/?.so;;"
export FONTCONFIG_PATH=$here/etc/fonts XDG_DATA_HOME=$here/usr/share # cairo's fonts
export PATH=$here/bin:$here/usr/bin:$PATH
exec "$@"
END
mkdir -p root/bin
cat >root/bin/busted <<'END'
#!/usr/bin/env bash
exec luajit "$(dirname "$0")/../usr/bin/busted" --ignore-lua "$@"
END
chmod +x run root/bin/busted
echo "$(du -sh . | cut -f1) in $1: ${#wanted[@]} packages"
