"""Calibration samples of a merge's tasks."""

from __future__ import annotations
