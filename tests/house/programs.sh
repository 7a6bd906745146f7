# sh programs.sh FOLDER EXAMPLE: what users of an example program rely on, with the program that FOLDER/consumer_example.EXAMPLE holds,
# at the smallest sizes.
set -u
folder=$1 name=$2
program_of() { echo "$folder/consumer_example.$1/$1"; }
program=$(program_of "$name")
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1

fail() {
  echo "$name: $*" >&2
  for file in said error; do [ -f $file ] && sed "s/^/  $file: /" $file >&2; done
  exit 1
}
runs() { # runs ARGUMENTS...: ends with status 0
  "$program" "$@" >said 2>error </dev/null || fail "status $? of: $*"
}
refuses() { # refuses WORDS ARGUMENTS...: ends with another status, says so on standard error, and has not begun
  words=$1
  shift
  "$program" "$@" >said 2>error </dev/null && fail "status 0 of: $*"
  grep -qF -e "$words" error || fail "expected '$words' of: $*"
  grep -q '^step ' said && fail "began with: $*"
  return 0
}
stops() { # stops SIGNAL STATUS WORDS ARGUMENTS...: the signal comes once it has said WORDS
  signal=$1 status=$2 words=$3
  shift 3
  "$program" "$@" >said 2>error </dev/null &
  pid=$!
  tries=0
  until grep -qF -e "$words" said; do
    kill -0 $pid 2>/dev/null || fail "ended by itself: $*"
    tries=$((tries + 1))
    [ $tries -lt 600 ] || { kill $pid; fail "never said '$words': $*"; }
    sleep 0.1
  done
  sleep 0.3
  kill -s "$signal" $pid
  wait $pid
  [ $? -eq "$status" ] || fail "expected status $status after SIG$signal of: $*"
}
poison() { # poison FILE: numbers of a saved model become NaN, behind its first ones, which may be counters
  header=$(od -An -tu8 -N8 "$1" | tr -d ' ')
  head -c 4096 /dev/zero | tr '\000' '\377' | dd of="$1" bs=4096 oflag=seek_bytes seek=$((1032 + header)) conv=notrunc 2>dd || fail dd
}
diverges() { # diverges FILE ARGUMENTS...: ends with a sentence, and the file stays
  file=$1
  shift
  poison "$file"
  cp "$file" poisoned
  "$program" "$@" >said 2>error </dev/null && fail "status 0 of: $*"
  grep -q 'was not finite in the last 10 steps' error || fail "expected a sentence about numbers that are not finite of: $*"
  cmp -s "$file" poisoned || fail "replaced $file in: $*"
}

i=0
while [ $i -lt 100 ]; do
  echo "And it came to pass, that line $i followed the one before."
  i=$((i + 1))
done >text
model="--text text --features 8 --context 16 --layers 1 --batch 1 --workers 1"
memory="--sub-keys 8 --top-k 2"

help() { # all options say what they are, none a path of the build or a range of many digits, and what is out of range is refused
  runs --help
  grep -F "$folder" said && fail "--help names a folder of the build"
  grep -E '[0-9]{21}|->' said && fail "--help has a range that nobody can read"
  awk '/^  -/ { if (open) bad = open; open = substr($0, 30, 2) ~ / [^ ]/ ? "" : $0; next }
       open && /^   +[^ ]/ { open = "" }
       END { if (open) bad = open; if (bad) { print bad; exit 1 } }' said || fail "an option without a word of help"
  grep -q -e --seed said && refuses "got -1" --seed -1
  refuses "expected 0 to 256, got -3" --workers -3
}

case $name in
  train_language_model)
    help
    refuses "expected 1 to 256, got 0" --layers 0
    refuses "got nan" --rate nan
    refuses "--save: none/x: cannot be created" $model --save none/x
    refuses "is read by this run" $model --save text
    echo words >notes
    refuses "holds no model" $model --save notes
    runs $model $memory --steps 2 --samples 1
    grep -qF "language_model.safetensors --prompt" said || fail "no command to play with"
    runs $model $memory --steps 2 --samples 0 --alone
    [ -f language_model-2.safetensors ] || fail "a name that is taken got no number"
    runs --text text --features 8 --context 2 --feed-forward dense --objective masked --steps 1 --workers 1 --save ''
    awk '$1 == "dense" && $3 > 1 { found = 1 } END { exit !found }' said || fail "nothing masked"
    # A run that is ended and goes on is the run that was not ended, and the command line need not say how it was.
    runs $model $memory --steps 150 --rate 0.002 --samples 0 --save whole
    stops TERM 143 "on Ctrl-C" $model $memory --steps 150 --rate 0.002 --save part
    grep -qF "goes on with:" said || fail "does not say how to go on"
    runs --resume part --samples 0 --workers 1
    cmp whole part && cmp whole.dense.safetensors part.dense.safetensors || fail "a resumed run is another one"
    stops INT 130 "replaces part" $model $memory --steps 1000000 --save part
    runs --resume whole --samples 0 --workers 1
    grep -qF "steps of this run are done" said || fail "does not say that the run is done"
    refuses "--features: expected 8 as in whole, got 16" --resume whole --features 16
    refuses "--memory-at: expected [0] as in whole, got [1]" --resume whole --memory-at 1
    runs --resume whole --batch 2 --steps 151 --samples 0 --workers 1
    grep -qF -e "--batch 2 instead of 1 in whole" said || fail "changes --batch without a word"
    "$(program_of long_context)" --text text --length 16 --layers 1 --features 8 --head-width 4 --steps 1 --save long >said 2>error
    refuses "long: expected a model saved by train_language_model, found one saved by long_context" --resume long
    refuses "found another file" --resume text
    diverges whole --resume whole --steps 1000 --workers 1
    ;;
  train_exits)
    help
    refuses "--save: none/x: cannot be created" $model --save none/x
    stops INT 130 "saves exits.safetensors" $model --steps 1000000
    [ -f exits.safetensors ] || fail "Ctrl-C saved nothing"
    runs $model --steps 2 --save ''
    ;;
  generate)
    help
    refuses "expected 0 to 1, got 7" model --threshold 7
    "$(program_of train_language_model)" $model $memory --steps 1 --samples 0 --save plain >said 2>error || fail "no model"
    "$(program_of train_exits)" $(echo "$model" | sed 's/--layers 1/--layers 2/') --steps 1 --save exits >said 2>error || fail "no model with exits"
    runs plain --length 3000 --temperature 9 --prompt '' --prompt And --workers 1
    [ "$(wc -c <said)" -eq 6005 ] || fail "expected two texts of 3000 bytes, all of them"
    grep -qF "sees 16 bytes" error || fail "does not say that texts outgrow the model"
    stops INT 130 "And" plain --length 100000000 --workers 1
    [ "$(wc -c <said)" -gt 20 ] || fail "text does not come as it is generated"
    runs exits --length 200 --temperature 9 --exit max_prob --threshold 0.5 --workers 1
    tr -d '\n\t -~\200-\377' <said | grep -q . && fail "control bytes"
    refuses "need a model of train_exits" plain --exit geometric
    refuses "found no such file" nothing
    ;;
  long_context)
    help
    small="--text text --length 64 --layers 1 --features 8 --head-width 4 --workers 1"
    refuses "--save: none/x: cannot be created" $small --save none/x
    stops TERM 143 "length 64" $small --steps 1000000 --save model
    [ -f model ] || fail "SIGTERM saved nothing"
    runs $small --length 32 --steps 2 --save model
    refuses "expected 1 to 16777216, got 0" --length 0
    ;;
  all_together)
    help
    small="--text text --sequences 1 --length 20 --workers 1"
    printf '{\n  "attention": ["local"],\n  "feed_forward": ["memory"],\n  "features": 8, "heads": 2,\n  "context": 16, "window": 4, "sub_keys": 8, "top_k": 2\n}\n' >good
    sed 's/"heads": 2/"heads": 3/' good >heads
    sed 's/"top_k": 2/"top_k": 2,/' good >comma
    refuses "heads:4: heads: expected a divisor of the 8 features, got 3" --config heads
    refuses "comma:6: expected a JSON object, found a syntax error" --config comma
    refuses "--save: none/x: cannot be created" --config good $small --save none/x
    runs --config good $small --steps 3 --save whole
    stops INT 130 "reversible blocks" --config good $small --steps 1000000 --save part
    [ -f part ] || fail "Ctrl-C saved nothing"
    sed 's/"top_k": 2/"top_k": 3/' good >other
    refuses "top_k: expected 2 as in whole, got 3" --config other --resume whole
    runs --resume whole --steps 4 $small
    grep -qF -e "--steps 4 instead of 3 in whole" said || fail "changes --steps without a word"
    diverges whole --resume whole --steps 100 --workers 1 --save whole
    ;;
  adaptive_pronunciation)
    help
    small="--limit 64 --features 8 --heads 2 --hidden 8 --blocks 2 --workers 1"
    refuses "--plot: none/x: cannot be created" $small --plot none/x
    refuses "--results: none/x: cannot be written" $small --results none/x
    stops INT 130 "words to learn from" $small --epochs 1000000 --save model
    [ -f model ] || fail "Ctrl-C saved nothing"
    runs --load model --word banana --workers 1
    refuses "--blocks: expected 2 as in model, got 3" --load model --blocks 3 --word banana
    ;;
  compress_attention)
    help
    refuses "--plot: none/x: cannot be created" --text text --plot none/x
    refuses "--save: none/x: cannot be created" --text text --save none/x
    refuses "--rank requires --import" --rank 3
    ;;
  duplication_task)
    help
    runs --word 3 --vocabulary 4 --features 8 --heads 2 --chunk 4 --buckets 2 --steps 20 --batch 1 --evaluations 2 --train-rounds 1 \
      --evaluation-rounds 1,0 --workers 1
    ;;
  use_your_own_tensor) runs ;;
esac
