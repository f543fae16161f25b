"""Models in and out: conversion of base checkpoints from other formats."""
