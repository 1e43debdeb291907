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

/// Can this host have a character device of ours at `path`? Not if one is there already: the kernel's own would stay.
pub fn is_possible(path: &Path) -> bool {
    path == Path::new("/dev/kvm") && Path::new("/dev/cuse").exists() && !path.exists()
}

/// Makes `/dev/kvm`. It goes with the daemon. `access`: who may open it, if udev is not to decide.
pub fn start(front: &Arc<Front>, access: Option<Access>) -> Result<()> {
    let device = Device::open(Path::new("/dev/cuse")).context("cannot open /dev/cuse. Next step: modprobe cuse")?;
    let kind = Kind::Cuse { name: "kvm".into() };
    let session =
        Session::start(device, kind, Arc::new(CharacterDevice(Arc::clone(front)))).context("cannot serve CUSE")?;
    let start = Instant::now();
    while !Path::new("/dev/kvm").exists() {
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
    chown("/dev/kvm", Some(access.uid), Some(access.gid))?;
    fs::set_permissions("/dev/kvm", Permissions::from_mode(access.mode))
}
