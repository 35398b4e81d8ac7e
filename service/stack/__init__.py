"""The local stack behind `fastslow up`: its processes are started in order, watched, restarted, and stopped in reverse order."""
