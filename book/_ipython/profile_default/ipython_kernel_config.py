# Read by every kernel that the Makefile starts (IPYTHONDIR), so that what a chapter prints depends
# on no reader's own IPython settings.
c = get_config()  # noqa: F821
c.InteractiveShell.xmode = "Minimal"  # shown mistakes: the message, not this machine's paths
c.InteractiveShell.colors = "nocolor"
c.HistoryManager.enabled = False
c.IPKernelApp.log_level = "ERROR"  # else each kernel's start is announced in the build log
