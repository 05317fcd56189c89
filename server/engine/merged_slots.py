"""The slots of running sequences, which need none while their adapter is merged into the base model."""

from server.engine.scheduling.scheduler import Scheduler


def enter_base(scheduler: Scheduler) -> None:
    """Release the slots of all running sequences, which all use the version that was just merged."""
    scheduler.gate.merged = True
    scheduler.blocks.change_weights(scheduler.gate.owner or "", scheduler.running)
    for seq in scheduler.running:
        scheduler.admission.release_slots(seq)


def leave_base(scheduler: Scheduler) -> bool:
    """Acquire slots for all running sequences and open the gate. Returns False, having requested a load, while the
    adapter is not on the device."""
    for seq in scheduler.running:
        if seq.adapters and not seq.slots:
            slot = scheduler.adapters.acquire(seq.adapters[0].digest)
            if slot is None:
                return False
            seq.slots = (slot,)
    scheduler.blocks.change_weights("", scheduler.running)
    scheduler.gate.open()
    return True
