# Unpacks this bundle, sets the environment for it and links its data sets into tmp_data. In the root of the repository:
#   source .bundle/activate.sh [DIRECTORY]
# Returns 1 if the bundle cannot be used. Called again, it only sets the environment.
_bundle=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
_unpacked=${1:-/tmp/hstu_bundle}
"${PYTHON:-python3}" "$_bundle/unpack.py" "$_unpacked" || return 1
. "$_unpacked/environment.sh"
mkdir -p "$TRITON_CACHE_DIR" tmp_data
for _store in "$_unpacked"/data/*; do
    if [ -e "$_store" ] && [ ! -e "tmp_data/${_store##*/}" ]; then ln -s "$_store" tmp_data/; fi
done
