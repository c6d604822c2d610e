#!/usr/bin/env bash
# What one GPU does: every part of the trainer that has to be measured on one, in at most eight minutes.
#
#   bench/gpu.sh            on a machine with a GPU; needs no network and no model
#   bench/gpu.sh --small    the same parts in small, on a CPU, in a few minutes
#
# Tables go to the terminal; $OUT (by default runs/gpu) gets NAME.txt, NAME.json and NAME.err of each part.
# PYTHON names the interpreter (by default .venv/bin/python, else python3), LIMIT the seconds in all. A part that
# fails does not stop the others; the exit status is 1 then. TRL, Liger and bitsandbytes are measured where installed.
set -u
cd "$(dirname "$0")/.." || exit
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD PYTHONUNBUFFERED=1
out=${OUT:-runs/gpu} limit=${LIMIT:-480} failed=0
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
small=0; [ "${1:-}" = --small ] && small=1
mkdir -p "$out"

part() { # name, largest number of seconds, module and arguments
    local name=$1 most=$2 left=$((limit - SECONDS)); shift 2
    if [ "$left" -lt 5 ]; then echo "== $name: no time left"; failed=1; return; fi
    echo "== $name: $*"
    timeout -k 5 $((most < left ? most : left)) "$python" -m "$@" >"$out/$name.txt" 2>"$out/$name.err"
    local status=$?
    cat "$out/$name.txt"
    if [ $status -eq 0 ]; then tail -n 1 "$out/$name.txt" >"$out/$name.json"; return; fi
    echo "$name ended with status $status:"; tail -n 5 "$out/$name.err"; failed=1
}

if [ $small -eq 1 ]; then
    part card 600 bench.gpu card --small
    part head 600 bench.head --tokens 64 --hidden 64 --vocabulary 5000 --heads trained --entropy no
    part numbers 600 bench.gpu numbers --small
    part steps 600 bench.gpu steps --small
    part trl 600 bench.train_step --size small --rewards coin --steps 1
    part comprehension 600 bench.comprehension --cases large --large-problems 1
else # the parts that matter most come first
    part card 60 bench.gpu card
    part head 90 bench.head
    part steps 200 bench.gpu steps
    part trl 150 bench.train_step --size 0.5b --rewards coin --steps 1
    part numbers 60 bench.gpu numbers
    part comprehension 60 bench.comprehension --cases large --large-problems 16
    part trl-1.5b 120 bench.train_step --size 1.5b --rewards coin --steps 1
fi
echo "== $SECONDS seconds; results in $out"
exit $failed
