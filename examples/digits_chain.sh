#!/usr/bin/env bash
# From images to images in 8 steps, on two CPU cores, in minutes, and without a download: a diffusion teacher of digits,
# its student, its samples, and how far both are from the data.
#
#     examples/digits_chain.sh                          # everything is in runs/ then
#     examples/digits_chain.sh --set train.seed=1       # what is given goes to both trainings
#
# Called again, it resumes what was interrupted and repeats nothing that is finished.
set -euo pipefail

# With nothing else, `mmgen train-teacher` trains on the digits that come with mmgen, and `mmgen distill` on the teacher's data.
mmgen train-teacher --out runs/digits-teacher "$@"
mmgen distill --teacher runs/digits-teacher --steps 8 --out runs/digits-student "$@"

# The student knows how many steps it is for. A grid of them, all classes in turn:
mmgen sample runs/digits-student --num 100 --classes balanced --out runs/digits-student.png

# runs/digits-student/samples.png has teacher and student from the same noise, results.json their figures.
