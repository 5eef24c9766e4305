# What `make lab` lets every kernel run as it starts: a cell run out of order is told which cell comes first.
from esm2kit import guide

guide.install()
del guide
