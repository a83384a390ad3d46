#!/usr/bin/env bash
# From a fresh machine (Linux, Python 3.11+, git) to recommendations, in minutes: sets up .venv, obtains and
# preprocesses MovieLens-100K, trains the retrieval model, and reports metrics, a learning curve and three users'
# top-10 films. Run again, it does only what is missing; interrupted, run it again.
#
# Everything it makes: .venv/, tmp_data/, runs/quickstart/ (delete that one to train anew).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
config=configs/ml_100k_retrieval.gin
data=tmp_data/ml-100k
run=runs/quickstart
stamp=$run/.trained

step=set-up
begin() {
    step=$2
    echo "[$1/4] $2${3:+ — $3}"
}
finish() {
    local code=$?
    trap - EXIT
    case $code in
        0) ;;
        130 | 143) echo "quickstart: interrupted during: $step. Run it again to go on." >&2 ;;
        *) echo "quickstart: failed at: $step (exit code $code); the lines above say why." >&2 ;;
    esac
    exit "$code"
}
trap finish EXIT
trap 'echo; exit 130' INT
trap 'exit 143' TERM

begin 1 "set-up"
scripts/install.sh

begin 2 "data" "MovieLens-100K"
if ! "$python" -c "from hstu.data.store.sequence_store import SequenceStore; SequenceStore.open('$data')" >/dev/null 2>&1; then
    # Replaces what is there, if anything: it did not open.
    "$python" scripts/preprocess_dataset.py --dataset_name ml-100k --force
fi

# Trained is: the training of this very configuration ended well. Anything else in the directory is thrown away.
wanted=$(sha256sum <"$config")
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    begin 3 "training" "done before; rm -r $run to train again"
else
    begin 3 "training" "some minutes on a CPU"
    rm -rf "$run"
    "$python" -m torch.distributed.run --standalone --nproc_per_node 1 pretrain_gr_retrieval.py \
        --gin-config-file "$config" --gin-bindings "TrainerArgs.output_dir = '$run'" \
        --gin-bindings "TrainerArgs.ckpt_save_dir = '$run/checkpoints'"
    # A training that was told to stop (SIGTERM) also ends well, but has not drawn its summary of a whole run.
    if grep -q '"status": "done"' "$run/summary.json"; then echo "$wanted" >"$stamp"; fi
fi

begin 4 "report"
"$python" scripts/quickstart_report.py --run_dir "$run"
