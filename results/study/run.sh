#!/bin/sh
# All runs of the study, from the repository root: sh results/study/run.sh [RUN ...]
#
# Without names, all of them in the order below; with names, those alone, so that several shells can share the work. A run that
# was interrupted is resumed, on another machine from its checkpoint in unfinished/ (if it has one there), and one whose results
# are stored already is skipped. The card of a run records the commit that it was started with. Variables for paths:
#   PYTHON, DEVICE (cpu, or the number of a CUDA device), CIFAR10, GTSRB (data sets), SAVED, STORAGE (logs, checkpoints)
set -eu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python="${PYTHON:-python}" device="${DEVICE:-cpu}" saved="${SAVED:-saved_data/study}" storage="${STORAGE:-storage/study}"
cifar10="${CIFAR10:-dataset/cifar-10-batches-py}" gtsrb="${GTSRB:-dataset/GTSRB}"
chosen=" $* "

# What attacks train first is stored with the results: it takes up to half an hour to make. Made again on another
# processor it would differ a little, and an unfinished run could not be resumed there.
mkdir -p "$saved/assets"
for asset in results/study/assets/*.npz results/study/unfinished/assets/*.npz; do
  kept="$saved/assets/${asset##*/}"
  if [ ! -e "$asset" ] || [ -e "$kept" ]; then continue; fi
  cp "$asset" "$kept.$$"
  mv "$kept.$$" "$kept"  # whole at once: another shell may do the same
done

# run NAME CONFIG SETTING ...: train, test, keep
run() {
  name="$1" config="config/$2.yaml" data="$cifar10"
  shift 2
  case "$chosen" in "  " | *" $name "*) ;; *) return 0 ;; esac
  if [ -f "results/study/$name.json" ]; then return 0; fi
  case "$name" in gtsrb_*) data="$gtsrb" ;; esac
  for setting in "$@"; do shift; set -- "$@" --set "$setting"; done
  set -- --config "$config" --gpu "$device" "$@" --set "run=$name" --set "dataset_dir=$data"
  set -- "$@" --set "saved_dir=$saved" --set "storage_dir=$storage"
  mkdir -p "$(dirname "$saved/$name")"
  if [ -f "results/study/unfinished/$name.pt" ] && [ ! -e "$storage/$name/checkpoint/latest_model.pt" ]; then
    kept="$storage/$name/checkpoint/latest_model.pt"
    mkdir -p "$(dirname "$kept")"
    cp "results/study/unfinished/$name.commit" "$saved/$name.commit"
    cp "results/study/unfinished/$name.pt" "$kept.$$"
    mv "$kept.$$" "$kept"  # last, and whole at once: without it all of this is done again
  fi
  [ -s "$saved/$name.commit" ] || git rev-parse HEAD > "$saved/$name.commit"
  "$python" ASD.py "$@"
  "$python" test.py "$@"
  commit="$(cat "$saved/$name.commit")"
  "$python" -m results.study.collect --saved "$saved" --storage "$storage" --run "$name" --commit "$commit"
}

# The attacks. IAB's generator and CLB's surrogate are made from the same data first, scaled down with the rest.
badnets="backdoor={badnets: {}}"
wanet="backdoor={poison_ratio: 0.1, wanet: {s: 1.0}}"  # weaker ones do not reach an undefended ASR of 90 %
wanet_cover="backdoor={poison_ratio: 0.1, wanet: {s: 1.0, cover_ratio: 2}}"
clb="backdoor={poison_ratio: 0.25, poison_mode: exact, clb: {eps: 32, training: fast, epochs: 10, \
surrogate: {resnet18_cifar: {width: 16, blocks: 1}}}}"  # weaker ones do not reach an undefended ASR of 95 %
blend="backdoor={blend: {}}"
refool="backdoor={poison_ratio: 0.1, refool: {}}"  # with 0.05 the undefended ASR is 93 %
iab="backdoor={iab: {width: 16, batch_size: 64, mask_epochs: 1, mask_lr: 0.003, generator_epochs: 1, \
surrogate: {resnet18_cifar: {width: 16, blocks: 1}}}}"
# The paper's own settings, but with the study's network and half as many steps per epoch.
paper="network={resnet18_cifar: {num_classes: 10, width: 16, blocks: 1}}"
steps="semi.mixmatch.train_iteration=512"
# Attacks that the paper does not have.
lookalike="backdoor={poison_mode: exact, lookalike: {surrogate: {resnet18_cifar: {width: 16, blocks: 1}}}}"
sig="backdoor={poison_ratio: 0.8, poison_mode: exact, sig: {}}"
sig_flipped="backdoor={sig: {label: flipped}}"
bpp="backdoor={bpp: {}}"
adaptive_patch="backdoor={poison_ratio: 0.003, poison_mode: exact, adaptive_patch: {}}"
adaptive_patch_1pct="backdoor={poison_ratio: 0.01, poison_mode: exact, adaptive_patch: {}}"  # 0.3 % is not learned
adaptive_blend="backdoor={poison_ratio: 0.003, poison_mode: exact, adaptive_blend: {}}"
adaptive_blend_1pct="backdoor={poison_ratio: 0.01, poison_mode: exact, adaptive_blend: {}}"  # 0.3 %: undefended ASR 57 %
all_to_all="backdoor={poison_ratio: 0.1, target_shift: 1, badnets: {}}"

run badnets/undefended cifar10_study_undefended "$badnets"
run badnets/asd cifar10_study "$badnets"
run wanet/undefended cifar10_study_undefended "$wanet"
run wanet/asd cifar10_study "$wanet"
run clb/undefended cifar10_study_undefended "$clb"
run clb/asd cifar10_study "$clb"
run blend/undefended cifar10_study_undefended "$blend"
run blend/asd cifar10_study "$blend"
run refool/undefended cifar10_study_undefended "$refool"
run refool/asd cifar10_study "$refool"
run iab/undefended cifar10_study_undefended "$iab"
run iab/asd cifar10_study "$iab"
run no_attack/undefended cifar10_study_undefended "backdoor={poison_ratio: 0}"
run no_attack/asd cifar10_study "backdoor={poison_ratio: 0}"
run badnets/asd-101 cifar10_study "$badnets" seed.seed=101
run badnets/asd-102 cifar10_study "$badnets" seed.seed=102
run badnets/undefended-101 cifar10_study_undefended "$badnets" seed.seed=101
run badnets/undefended-102 cifar10_study_undefended "$badnets" seed.seed=102
run wanet/asd-101 cifar10_study "$wanet" seed.seed=101
run wanet/asd-102 cifar10_study "$wanet" seed.seed=102
run wanet/undefended-101 cifar10_study_undefended "$wanet" seed.seed=101
run wanet/undefended-102 cifar10_study_undefended "$wanet" seed.seed=102
run gtsrb_badnets/undefended gtsrb_study defense=none num_epochs=20
run gtsrb_badnets/asd gtsrb_study
run wanet_published/undefended cifar10_study_undefended "backdoor={wanet: {}}"
run wanet_published/asd cifar10_study "backdoor={wanet: {}}"
run wanet_s1/undefended cifar10_study_undefended "backdoor={wanet: {s: 1.0}}"
run refool_published/undefended cifar10_study_undefended "$refool" backdoor.poison_ratio=0.05
run refool_published/asd cifar10_study "$refool" backdoor.poison_ratio=0.05
run clb_eps8/undefended cifar10_study_undefended "$clb" backdoor.clb.eps=8
run clb_eps8/asd cifar10_study "$clb" backdoor.clb.eps=8
run clb_eps16/undefended cifar10_study_undefended "$clb" backdoor.clb.eps=16
run clb_half/undefended cifar10_study_undefended "$clb" backdoor.clb.eps=16 backdoor.poison_ratio=0.5
run clb_paper/asd baseline_asd "$paper" "$steps" runtime.amp=true "$clb"
run iab_paper/asd baseline_asd "$paper" "$steps" runtime.amp=true "$iab"
run refool_paper/asd baseline_asd "$paper" "$steps" runtime.amp=true "$refool"
run badnets_paper/asd baseline_asd "$paper" "$steps" runtime.amp=true "$badnets"
run lookalike_all/undefended cifar10_study_undefended "$lookalike" backdoor.lookalike.share=1.0
run lookalike/undefended cifar10_study_undefended "$lookalike"
run lookalike/asd cifar10_study "$lookalike"
run sig/undefended cifar10_study_undefended "$sig"
run sig/asd cifar10_study "$sig"
run bpp/undefended cifar10_study_undefended "$bpp"
run bpp/asd cifar10_study "$bpp"
run adaptive_patch/undefended cifar10_study_undefended "$adaptive_patch"
run adaptive_patch_1pct/undefended cifar10_study_undefended "$adaptive_patch_1pct"
run adaptive_patch_1pct/asd cifar10_study "$adaptive_patch_1pct"
run adaptive_blend/undefended cifar10_study_undefended "$adaptive_blend"
run adaptive_blend_1pct/undefended cifar10_study_undefended "$adaptive_blend_1pct"
run adaptive_blend_1pct/asd cifar10_study "$adaptive_blend_1pct"
run all_to_all/undefended cifar10_study_undefended "$all_to_all"
run all_to_all/asd cifar10_study "$all_to_all"
# Other forms of the attacks, without a defense alone: how strong are they?
run sig_flipped/undefended cifar10_study_undefended "$sig_flipped"
run wanet_cover/undefended cifar10_study_undefended "$wanet_cover"
run bpp_no_cover/undefended cifar10_study_undefended "$bpp" backdoor.bpp.cover_ratio=0
run bpp_dithered/undefended cifar10_study_undefended "$bpp" backdoor.bpp.dithering=true
run adaptive_blend_smooth/undefended cifar10_study_undefended "$adaptive_blend" backdoor.adaptive_blend.pattern=smooth
