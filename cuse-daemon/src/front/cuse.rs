//! `/dev/kvm` as a character device of ours, where the kernel has CUSE.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cuse_rs::{Device, Kind, Session};

use super::{Access, CharacterDevice, Front};

/// How long udev or devtmpfs may take to make the device node.
const PATIENCE: Duration = Duration::from_secs(5);

/// The only device that CUSE is asked for.
const KVM: &str = "/dev/kvm";

/// What a character device of ours at `path` begins with, or why there can be none, for the user.
pub fn channel(path: &Path) -> Result<Device, String> {
    if path != Path::new(KVM) {
        return Err(format!("CUSE is for {KVM} alone"));
    }
    // The kernel's own would stay, and ours could not have the name.
    if path.exists() {
        return Err(format!("{KVM} was there before, and is back when softkvm ends"));
    }
    // Opening loads the module, if the node is there and the kernel finds it.
    Device::open(Path::new("/dev/cuse"))
        .map_err(|err| format!("/dev/cuse: {err}; for a character device: modprobe cuse, and start softkvm again"))
}

/// Makes `/dev/kvm`. It goes with the daemon. `access`: who may open it, if udev is not to decide.
pub fn start(front: &Arc<Front>, device: Device, access: Option<Access>) -> Result<()> {
    let kind = Kind::Cuse { name: "kvm".into() };
    let session =
        Session::start(device, kind, Arc::new(CharacterDevice(Arc::clone(front)))).context("cannot serve CUSE")?;
    let start = Instant::now();
    while !Path::new(KVM).exists() {
        if session.is_over() || start.elapsed() > PATIENCE {
            bail!("the kernel did not make /dev/kvm. Next step: see dmesg, or mount devtmpfs on /dev");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    if let Some(access) = access {
        admit(access).context("cannot set the permissions of /dev/kvm")?;
    }
    front.device.set(session).map_err(|_| anyhow::anyhow!("/dev/kvm is served twice"))
}

/// Owner first: until the mode follows, nobody has more than before.
fn admit(access: Access) -> std::io::Result<()> {
    chown(KVM, Some(access.uid), Some(access.gid))?;
    fs::set_permissions(KVM, Permissions::from_mode(access.mode))
}
