//! What agent and guardian say to each other: packets of four words, one packet a message, file descriptors beside the
//! packet that arms.

use std::{io, mem::size_of, os::fd::RawFd};

/// Most filesystems of one arming: the kernel passes 253 descriptors at most in one packet.
pub const ARMED_MAX: usize = 250;

/// Agent to guardian. `a` = deadline in ms, `b` = number of descriptors that come along.
pub(super) const ARM: u32 = 1;
/// As `ARM`; the descriptors are connections to the agents of guests, and what is said of filesystems below is said of guests.
pub(super) const ARM_GUEST: u32 = 6;
/// No answer. The agent is about to freeze filesystem `a`: from now on the guardian is answerable for it.
pub(super) const TAKE: u32 = 2;
/// No answer. Filesystem `a` is thawed, or was never frozen by the agent.
pub(super) const RELEASE: u32 = 3;
/// The guardian makes sure that nothing it is answerable for is frozen, then answers and forgets.
pub(super) const DISARM: u32 = 4;
/// Answered at once.
pub(super) const PING: u32 = 5;

/// Answer: `a` = how many filesystems the guardian itself thawed.
pub(super) const DONE: u32 = 0;
/// Answer: armed already.
pub(super) const BUSY: u32 = 1;
/// Answer: not understood.
pub(super) const MALFORMED: u32 = 2;
/// Answer to `DISARM`: the deadline had passed before; `a` as for `DONE`.
pub(super) const EXPIRED: u32 = 3;

/// A request (`word` is what is asked) or an answer to it (`word` is the result).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub word: u32,
    pub seq: u32,
    pub a: u32,
    pub b: u32,
}

impl Packet {
    pub(super) const BYTES: usize = 16;

    pub(super) fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        for (place, word) in bytes.chunks_exact_mut(4).zip([self.word, self.seq, self.a, self.b]) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Some(Self { word: word(0), seq: word(4), a: word(8), b: word(12) })
    }
}

/// Sends a packet without ever raising `SIGPIPE`.
pub(super) fn send(socket: RawFd, packet: Packet) -> io::Result<()> {
    let bytes = packet.encode();
    // SAFETY: the buffer is live and of the length given.
    let sent = unsafe { libc::send(socket, bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

const CONTROL_BYTES: usize = 16 + ARMED_MAX * size_of::<RawFd>() + 16;

/// What was received.
pub(super) enum Received {
    /// The other side is gone.
    End,
    /// A packet; so many descriptors were put into the array.
    Packet(Option<Packet>, usize),
}

/// Receives a packet and its descriptors, allocating nothing.
pub(super) fn receive(socket: RawFd, fds: &mut [RawFd; ARMED_MAX]) -> io::Result<Received> {
    #[repr(C, align(16))]
    struct Control([u8; CONTROL_BYTES]);
    let mut control = Control([0; CONTROL_BYTES]);
    let mut bytes = [0_u8; 32];
    let mut vector = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: a `msghdr` of zeros is valid: no name, no buffers.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut vector;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL_BYTES as _;
    // SAFETY: the header points at live buffers of the lengths given.
    let got = unsafe { libc::recvmsg(socket, &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    let mut count = 0;
    // SAFETY: the header was filled by the kernel; the macros stay within msg_controllen.
    let mut part = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !part.is_null() {
        // SAFETY: `part` is a control message header within `control`.
        let (level, kind, length) =
            unsafe { ((*part).cmsg_level, (*part).cmsg_type, (*part).cmsg_len as usize) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: computes the size of a header, touches no memory.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            let inside = length.saturating_sub(head) / size_of::<RawFd>();
            // SAFETY: the data of `part` follows its header.
            let data = unsafe { libc::CMSG_DATA(part) }.cast::<RawFd>();
            for index in 0..inside {
                // SAFETY: `index` is within the data that the kernel wrote.
                let fd = unsafe { data.add(index).read_unaligned() };
                if let Some(place) = fds.get_mut(count) {
                    *place = fd;
                    count += 1;
                } else {
                    // SAFETY: the descriptor was just given to us and nobody else knows it.
                    unsafe { libc::close(fd) };
                }
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        part = unsafe { libc::CMSG_NXTHDR(&raw const header, part) };
    }
    if got == 0 && count == 0 {
        return Ok(Received::End);
    }
    Ok(Received::Packet(Packet::decode(&bytes[..got]), count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_survive_and_others_are_refused() {
        let packet = Packet { word: ARM, seq: 7, a: 10_000, b: 3 };
        assert_eq!(Packet::decode(&packet.encode()), Some(packet));
        assert_eq!(Packet::decode(&[0; 15]), None);
        assert_eq!(Packet::decode(&[0; 17]), None);
    }
}
