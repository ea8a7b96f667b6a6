"""The waits that depend on each other: who waits for what, and why as long as that.

All in seconds. tests/test_waits.py holds the relations.
"""

# A rank fails, and its peers fail with it. The first to end is taken for the cause, so the others
# wait before they end; and launch.py kills what is left only when all had time to report.
PEER_LOST_SECONDS = 3  # a rank that lost a peer, before it ends: torchrun looks each 0.1 s
LOOK_SECONDS = 1.0  # launch.py, between two looks for the failure report of any rank
SHUTDOWN_SECONDS = 8  # launch.py, from that report until it kills its ranks: the longest of these

# A rank hangs, and its peers wait for it. Each watchdog ends its own rank beyond the limit of a
# phase. A rank that holds the interpreter's lock cannot run its watchdog: faulthandler, in C,
# writes its stacks later than the watchdogs of its peers, so that they have reported, and launch.py
# ends it before it kills all.
TICKS_SECONDS = 1.0  # a watchdog, between two looks at its loop
LOCKED_SECONDS = 3.0  # faulthandler, beyond the limit of the watchdog: it writes the stacks
LOCKED_LOOKS = 3.0  # launch.py, at stacks that stay, before it ends their rank
AWAKE_SECONDS = 30.0  # launch.py, after it was stopped itself, before it looks again
STOPPED_SECONDS = 5.0  # a watchdog that wakes up later than this: its whole process was stopped

# A rank does not answer in a collective. Its watchdog, and those of its peers, should tell first.
COLLECTIVE_SECONDS = 600  # of the loop: NCCL's own default; gloo's is 1,800
MEET_SECONDS = 1.0  # ranks that wait for what rank 0 decides, between two collectives
SAVE_COLLECTIVE_SECONDS = 7200  # of a save: a peer may write that long, to a slow file system

# The nodes of a job meet. Whoever cannot reach another tells before torchrun's own ten minutes.
MARK_SECONDS = 300.0  # all launchers have begun: each imports torch from the shared file system
REACH_SECONDS = 30.0  # a connection between two hosts comes about

# A rank that hangs writes down its collectives; the report of who failed waits for that.
RECORD_SECONDS = 1.0  # torch's flight recorder, which may wait for NCCL itself

# A model says something to a prompt on one rank, and the others wait in a collective.
ANSWER_SECONDS = 300  # then the text is cut

# What a phase may take, beyond a step once there is one.
CONNECT_SECONDS = 600  # all ranks have imported torch; NCCL itself would wait for ever
LOAD_SECONDS = 900  # the model and the optimizer; of a verification, between two files
COMPILE_SECONDS = 1800  # the warm-up, and the first two steps and evaluations
SAVE_SECONDS = 1800  # a save that the loop has to wait for, to a slow file system

# The end of the job.
MARGIN_SECONDS = 15  # kept free to leave in order: logs, the last status, torchrun's own end

# The run folder changes its owner. The former one may be alive on a node that Slurm lost: it looks
# at the lease before it writes, but may write for a while without looking again. The new one waits
# for longer than that.
OWNED_SECONDS = 1.0  # an owner may write without another look
TAKEOVER_SECONDS = 3.0  # the new owner, before it writes
HEARTBEAT_SECONDS = 15.0  # the launcher of each node, between two heartbeats
ALIVE_SECONDS = 120.0  # without a heartbeat for so long, a job is gone: clocks and caches differ
CLAIM_SECONDS = 120.0  # from submit.sh to the lease, on a host that cannot be looked at
VISIBLE_SECONDS = 10.0  # a rank on another node, until the new lease shows up (caches of NFS)
