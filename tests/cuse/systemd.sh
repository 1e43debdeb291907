# Run by systemd, as root, on the console. Every `check` is a step of the test; the first that fails ends it.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin
ROUNDS=@ROUNDS@
CASES='@CASES@'
rule=/usr/local/lib/udev/rules.d/65-softkvm.rules
modules=/usr/lib/modules/$(uname -r)/kernel/fs/fuse

# check NAME EXPECTED FOUND
check() {
    if [ "$2" = "$3" ]; then
        echo "ok: $1: $3"
    else
        echo "FAILED: $1: '$3' is not '$2'"
        systemctl status softkvm --no-pager --full
        journalctl --boot --no-pager --lines=60 --unit=softkvm --unit=plain
        ps -o pid,ppid,user,stat,args | grep -v ' \['
        poweroff -f
    fi
}
setpriv() { /usr/bin/setpriv "$@"; } # busybox has one that can do less
as() { user=$1; shift; setpriv --reuid=$user --regid=$user --init-groups -- "$@"; }
device() { if [ -e /dev/kvm ]; then stat -c '%F %a %U %G' /dev/kvm; else echo none; fi; }
opens() { as $1 sh -c ': <>/dev/kvm && echo yes' 2>&1 | sed 's/.*: //'; }
modern() { as member kvm_ioctls --exact --test-threads=1 ioctls::vcpu::tests::test_run_code; }
legacy() { as member /usr/bin/legacy "$@"; }
property() { systemctl show --property=$1 --value softkvm; }
starts() { systemctl reset-failed softkvm 2>/dev/null; systemctl start softkvm; }
# What a daemon may leave: processes, mounts, sockets and mount points, devices of CUSE.
left() { echo $(pidof softkvm) $(grep softkvm /proc/mounts) $(ls /run/softkvm) $(ls /sys/class/cuse 2>/dev/null); }
# within SECONDS COMMAND: until it says yes.
within() {
    end=$(($(date +%s) + $1)); shift
    until "$@"; do [ $(date +%s) -lt $end ] || return 1; sleep 0.1; done
}
nothing_left() { [ -z "$(left)" ]; }
# Waits for the client in the background. outcome: its status, 1 if it saw an error, and how often it says so.
ends() {
    if within 20 gone $client; then
        wait $client
        outcome="$? $(grep -c FAILED /tmp/client)"
    else
        outcome="stuck in $(cat /proc/$(pidof legacy)/stack /proc/$(property MainPID)/task/*/stack)"
    fi
}
gone() { ! kill -0 $1 2>/dev/null; }
# A character device, by a daemon that the manager has started once more than $1 times.
again() { [ "$(property NRestarts)" -gt $1 ] && [ "$(systemctl is-active softkvm)" = active ] && [ -c /dev/kvm ]; }

echo "up for $(cut -d ' ' -f 1 /proc/uptime) s"
check 'the manager' /usr/lib/systemd/systemd "$(readlink /proc/1/exe)"
check 'udevd' active "$(systemctl is-active systemd-udevd)"
check 'before' 'none inactive' "$(device) $(systemctl is-active softkvm)"
check 'the unit is understood' '' "$(systemd-analyze verify softkvm.service 2>&1 | grep -v "Command 'man")"

# The unit, and the rule in it.
systemctl start softkvm
check 'start' '0 active' "$? $(systemctl is-active softkvm)"
udevadm settle
check 'device' 'character special file 660 root kvm' "$(device)"
check 'rule' 'GROUP N MODE 0660' \
    "$(echo $(udevadm test /sys/class/cuse/kvm 2>&1 | sed -n 's/.*65-softkvm.rules:[0-9]* //p' | sed 's/GROUP [0-9]*/GROUP N/'))"
check 'member' yes "$(opens member)"
check 'stranger' 'Permission denied' "$(opens stranger)"
modern
check 'modern client' 0 $?
legacy --seconds 1 $CASES
check 'legacy client' 0 $?

# Refusals, with the unit's daemon in place.
said=$(softkvm serve 2>&1)
check 'second daemon' "75 1" "$? $(echo "$said" | grep -c "already, by process $(property MainPID). Next step:")"
check 'the first serves on' yes "$(opens member)"
systemctl stop softkvm
check 'stop' '0 none success' "$? $(device) $(property Result)"
check 'left behind' '' "$(left)"
said=$(as member softkvm serve 2>&1)
check 'no root' "77 1" "$? $(echo "$said" | grep -c 'Next step: sudo')"
said=$(setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin -- softkvm serve 2>&1)
check 'no CAP_SYS_ADMIN' "77 1" "$? $(echo "$said" | grep -c 'Next step: run softkvm as root with CAP_SYS_ADMIN')"
said=$(softkvm serve --group nobodys 2>&1)
check 'no group' "78 1" "$? $(echo "$said" | grep -c 'Next step: groupadd')"
# The guard of a daemon that refused ends after it.
within 5 nothing_left
check 'refusals leave nothing' '' "$(left)"

# The rule alone: another mode there, and a daemon that leaves it to udev.
sed -i s/0660/0640/ $rule
udevadm control --reload
systemd-run --quiet --unit=plain --service-type=notify softkvm serve
udevadm settle
check 'rule alone' 'character special file 640 root kvm' "$(device)"
systemctl stop plain
sed -i s/0640/0660/ $rule
udevadm control --reload

# spins: a client that is in KVM_RUN.
spins() {
    starts
    legacy --seconds 1000 spin >/tmp/client 2>&1 &
    client=$!
    within 20 running
    check 'a guest runs' 0 $?
}
running() { softkvm status | grep -q running; }

# The unit is stopped while a client is in KVM_RUN.
spins
systemctl stop softkvm
check 'stop with a guest' '0 none success' "$? $(device) $(property Result)"
ends
check 'client of a unit stopped in KVM_RUN' '1 1' "$outcome"
check 'left behind with a guest' '' "$(left)"

# All processes of the unit are killed while a client is in KVM_RUN; the manager starts it again.
spins
before=$(property NRestarts)
systemctl kill --signal=KILL softkvm
ends
cat /tmp/client
check 'client of a unit killed in KVM_RUN' '1 1' "$outcome"
within 20 again $before
check 'restart' 0 $?
udevadm settle
check 'device of the new daemon' 'character special file 660 root kvm' "$(device)"
modern
check 'modern client of the new daemon' 0 $?

# The daemon alone is killed, as for want of memory, at moments that are looked for: it is made to stand, looked at, and
# goes on for a while if the moment is another one.
held() { read -r _ _ state _ </proc/$victim/stat; [ $state = t ]; }
asking() { # A worker waits for an answer to openat (257) that another one owes it.
    for task in /proc/$daemon/task/*; do
        read -r call _ <$task/syscall && read -r _ _ state _ <$task/stat && [ "$call $state" = '257 D' ] && return
    done
    return 1
}
# hunt MOMENT CASE KILL…: outcome as above, `never` if there was no such moment.
hunt() {
    moment=$1 case=$2; shift 2
    starts
    daemon=$(property MainPID)
    before=$(property NRestarts)
    legacy --seconds 1000 $case >/tmp/client 2>&1 &
    client=$!
    victim=
    until victim=$(pidof legacy); do :; done
    looks=0
    while :; do
        kill -STOP $daemon
        $moment && $moment && break
        looks=$((looks + 1))
        kill -CONT $daemon
        sleep 0.01
        [ $looks -lt 2000 ] || { outcome=never; return; }
    done
    "$@"
    ends
}
main_process() { kill -KILL $daemon; }
unit() { systemctl kill --signal=KILL softkvm; }
for round in $(seq $ROUNDS); do
    for killed in main_process unit; do
        for at in 'held create' 'held churn' 'asking create'; do # `create` hardly does anything but ask.
            # Who kills the unit kills the guard: nobody gives a held thread its signals back.
            case "$killed $at" in 'unit held'*) continue ;; esac
            hunt $at $killed
            # A touch of RAM has no error to give: SIGBUS ends a client in one, SIGSEGV one that was held there.
            [ "$at" != 'held churn' ] || outcome=$(echo "$outcome" | sed 's/^13[59] 0$/1 1/')
            check "$at, $killed killed, at look $looks" '1 1' "$outcome"
            check 'signals of the client' 0 $(grep -c 'stay blocked' /tmp/client)
            within 20 again $before
            check 'restart' 0 $?
        done
    done
done
modern
check 'modern client after all that' 0 $?
systemctl stop softkvm
check 'stop after all that' '0 none' "$? $(device)"

# A kernel without CUSE: the unit serves a file, and says how to have more.
rmmod cuse
mv $modules/cuse.ko /tmp/
starts
check 'device without CUSE' 'regular empty file 660 root kvm' "$(device)"
check 'stranger without CUSE' 'Permission denied' "$(opens stranger)"
journalctl --boot --unit=softkvm --output=cat --lines=3 | grep -q 'is a FUSE file.*/dev/cuse: .*modprobe cuse'
check 'the way to CUSE' 0 $?
modern
check 'modern client without CUSE' 0 $?
systemctl stop softkvm
check 'left behind without CUSE' 'none' "$(device)$(left)"

# The kernel's own KVM, nested in this machine: the unit stays out of its way, softkvm by hand stands before it.
for module in irqbypass kvm kvm-amd; do insmod /kvm/$module.ko; done
udevadm settle
check 'own KVM' 'character special file 660 root kvm' "$(device)"
starts
check 'the unit beside it' 'inactive no' "$(systemctl is-active softkvm) $(property ConditionResult)"
systemd-run --quiet --unit=plain --service-type=notify softkvm serve
check 'softkvm before it' 'regular empty file 660 root kvm' "$(device)"
journalctl --boot --unit=plain --output=cat | grep -q 'was there before, and is back when softkvm ends'
check 'it is told' 0 $?
systemctl stop plain
check 'own KVM again' 'character special file 660 root kvm' "$(device)"
rmmod kvm_amd

# A kernel without FUSE: no file system either. The manager does not try again.
mv $modules/fuse.ko /tmp/
umount /sys/fs/fuse/connections 2>/dev/null
rmmod fuse
starts
check 'unit without FUSE' '69 failed 0' "$(property ExecMainStatus) $(systemctl is-active softkvm) $(property NRestarts)"
journalctl --boot --unit=softkvm --output=cat --lines=5 | grep -q 'cannot open /dev/fuse.*Next step: load the module: modprobe fuse'
check 'the way to FUSE' 0 $?
systemd-analyze security softkvm --no-pager | tail -n 1
echo "up for $(cut -d ' ' -f 1 /proc/uptime) s"
echo ALL STEPS OK
poweroff -f
