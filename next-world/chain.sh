#!/bin/bash
# The long chain of issue 13: every part goes on where it was cut off. THREADS=1 or 2 (default 1); set -e.
#   setsid nohup ./chain.sh > ./chain.out 2>&1 &
set -e
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${THREADS:-1}
cd .
mkdir -p build2 model
# the autoencoder's checkpoint of ae_train.py (stop that process first), once
[ -e build2/ae.safetensors ] || python convert_ae.py build/ae.safetensors build2/ae.safetensors
cd repo
B="python tiny/build.py --device cpu --threads ${THREADS:-1} --build ./build2 --out ./model"
[ -e ../model/vae ] || $B --part ae        # 10,000 steps
$B --part unet --steps ${UNET_STEPS:-30000}
$B --part clip
$B --part judge
$B --check --grid ./base.png
