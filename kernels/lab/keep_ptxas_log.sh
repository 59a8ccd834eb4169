#!/bin/sh
# keep_ptxas_log.sh FOLDER nvcc ARGS...: runs nvcc; what `-Xptxas -v` reports goes to FOLDER/<object>.log, for
# check_cuda_build.lua, everything else it says to where it would have gone.
folder=$1
shift
mkdir -p "$folder"
object=link
previous=
for argument in "$@"; do
  [ "$previous" = -o ] && object=${argument##*/}
  previous=$argument
done
log=$folder/$object.log
"$@" 2>"$log.all"
status=$?
grep -E '^ptxas info|^    (Function properties|[0-9]+ bytes)' "$log.all" >"$log"
grep -vE '^ptxas info|^ *Function properties|^    [0-9]+ bytes' "$log.all" >&2
rm -f "$log.all"
exit $status
