//! A service manager that waits for us: the protocol of sd_notify(3).

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Tells whoever started us and asked for it that clients may come.
pub fn ready() {
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET")
        && let Err(err) = send(&socket, b"READY=1")
    {
        tracing::warn!(%err, "the service manager was not told");
    }
}

fn send(socket: &OsStr, message: &[u8]) -> std::io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(message, &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_address_are_reached() {
        let path = std::env::temp_dir().join(format!("softkvm-notify-{}", std::process::id()));
        let name = format!("@softkvm-notify-{}", std::process::id());
        let by_path = UnixDatagram::bind(&path).unwrap();
        let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name.as_bytes()[1..]).unwrap()).unwrap();
        for (socket, address) in [(&by_path, path.as_os_str()), (&by_name, OsStr::new(&name))] {
            send(address, b"READY=1").unwrap();
            let mut message = [0; 16];
            assert_eq!(socket.recv(&mut message).unwrap(), 7);
            assert!(message.starts_with(b"READY=1"));
        }
        std::fs::remove_file(path).unwrap();
        assert!(send(OsStr::new("/nonexistent/socket"), b"").is_err());
    }
}
