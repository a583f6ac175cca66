#!/bin/sh
# The paper's question on COCO: TResNet-M against ResNet-50 as FCOS's backbone. One command; NOT RUN by this project.
#
#     sh benchmarks/coco_detection.sh COCO_DIR OUTPUT_DIR [torchrun's number of processes]
#
# COCO_DIR holds train2017/, val2017/ and annotations/instances_{train,val}2017.json (validation is read after every
# epoch; there is no test set with boxes, so what is carved from train as one is not looked at). Both backbones start
# from released ImageNet weights, have the same head (FCOS, 256 wide, 4 convolutions), the 1x schedule and 800 px.
# Eight processes of 2 pictures are the published global batch of 16.
#
# What to compare with: torchvision's FCOS with ResNet-50 has 39.2 mAP on val2017. The TResNet paper's detection table
# could not be checked against its source here, so no figure of it is quoted.
set -e
data=$1
output=$2
processes=${3:-8}
for model in tresnet_m resnet50; do
    torchrun --standalone --nproc-per-node "$processes" -m convscale train --task detection --model "$model" \
        --head fcos --init pretrained --detector norm=frozen --detector frozen_stages=2 --data-dir "$data" \
        --img-size 800 --recipe detect-1x -b 2 --device cuda --output "$output/$model" --resume
    python -m convscale evaluate "$output/$model" --data-dir "$data" --split validation --device cuda --json \
        > "$output/$model.json"
    python -m convscale export "$output/$model" --data-dir "$data" --output "$output/$model-artefact" --overwrite
    python -m convscale measure "$output/$model-artefact" -b 1 --device cuda
done
