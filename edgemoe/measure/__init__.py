"""Measurements that run text through a loaded model: profiles, evaluations, scores of tasks."""
