"""libvirt's XML: what is read from it, and what is written."""

from xml.etree import ElementTree

from backupfs.sources import domain_xml

DOMAIN = """
<domain type='kvm' id='1'><name>web</name><devices>
 <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/a,b &amp; c.qcow2' index='2'/>
  <backingStore type='file' index='3'><format type='qcow2'/><source file='/images/base'/>
   <backingStore type='block'><source dev='/dev/vg/template'/><backingStore/></backingStore></backingStore>
  <target dev='vda' bus='virtio'/></disk>
 <disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/><readonly/></disk>
 <disk type='file' device='cdrom'><target dev='sdb'/></disk>
 <disk type='file' device='floppy'><source file='/floppy'/><target dev='fda'/></disk>
 <disk type='file' device='disk'><source file='/seed'/><target dev='vdb'/><readonly/></disk>
 <disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg/data'/><target dev='vdc'/>
  <shareable/></disk>
 <disk type='network' device='disk'><driver type='raw'/><source protocol='rbd' name='pool/image'/>
  <target dev='vdd'/></disk>
 <disk type='volume' device='disk'><source pool='default' volume='data'/><target dev='vde'/></disk>
 <disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sdc'/></disk>
 <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
</devices><seclabel type='dynamic' model='selinux'><label>system_u</label></seclabel>
<seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+108</label><imagelabel>+1:+1</imagelabel></seclabel>
</domain>"""


def test_disks() -> None:
    found = {disk.name: disk for disk in domain_xml.disks(DOMAIN)}
    assert list(found) == ["vda", "vdc", "vdd", "vde", "sdc"]
    vda = found["vda"]
    assert (vda.path, vda.description, vda.image_format) == ("/images/a,b & c.qcow2",) * 2 + ("qcow2",)
    assert vda.below == {"/images/base", "/dev/vg/template"}
    assert (found["vdc"].path, found["vdc"].shared, vda.shared) == ("/dev/vg/data", True, False)
    assert (found["vdd"].path, found["vdd"].description) == (None, "network:rbd:pool/image")
    assert (found["vde"].path, found["vde"].description, found["vde"].image_format) == (
        None,
        "volume:default:data",
        "raw",
    )
    assert (found["sdc"].passed_through, vda.passed_through) == (True, False)


def test_disks_in_io_threads() -> None:
    """By the disk's own driver, or by the controller that it hangs on."""
    text = """<domain><devices>
     <controller type='scsi' index='0'/><controller type='scsi' index='1'><driver iothread='2'/></controller>
     <disk type='file' device='disk'><driver type='qcow2' iothread='1'/><source file='/a'/>
      <target dev='vda' bus='virtio'/></disk>
     <disk type='file' device='disk'><driver type='qcow2'><iothreads><iothread id='1'/></iothreads></driver>
      <source file='/b'/><target dev='vdb' bus='virtio'/></disk>
     <disk type='file' device='disk'><source file='/c'/><target dev='sda' bus='scsi'/>
      <address type='drive' controller='1' bus='0' target='0' unit='0'/></disk>
     <disk type='file' device='disk'><source file='/d'/><target dev='sdb' bus='scsi'/>
      <address type='drive' controller='0' bus='0' target='0' unit='1'/></disk>
     <disk type='file' device='disk'><source file='/e'/><target dev='vdc' bus='virtio'/></disk>
    </devices></domain>"""
    found = {disk.name: disk.io_thread for disk in domain_xml.disks(text)}
    assert found == {"vda": True, "vdb": True, "sda": True, "sdb": False, "vdc": False}


def test_disks_that_are_a_part_of_their_image() -> None:
    whole = "<disk type='file'><source file='/a'/><target dev='vda'/></disk>"
    part = whole.replace("<source file='/a'/>", "<source file='/a'><slices><slice type='storage'/></slices></source>")
    found = domain_xml.disks(f"<domain><devices>{whole}{part.replace('vda', 'vdb')}</devices></domain>")
    assert [disk.sliced for disk in found] == [False, True]


def test_agent_and_user() -> None:
    assert domain_xml.agent_state(DOMAIN) == "connected"
    assert domain_xml.agent_state(DOMAIN.replace(" state='connected'", "")) == "disconnected"
    assert domain_xml.agent_state("<domain><devices/></domain>") is None
    assert domain_xml.qemu_user(DOMAIN) == (64055, 108)
    assert domain_xml.qemu_user("<domain/>") is None
    assert domain_xml.qemu_user(DOMAIN.replace("+64055:+108", "qemu:qemu")) is None


def test_a_backup_of_disks_with_and_without_a_checkpoint() -> None:
    written = domain_xml.backup("/s/<nbd>", {"vda": "/s/0", "vd&b": "/s/1"}, {"vda": "old"}, "changed")
    root = ElementTree.fromstring(written)
    assert root.attrib == {"mode": "pull"}
    server = root.find("server")
    assert server is not None
    assert server.attrib == {"transport": "unix", "socket": "/s/<nbd>"}
    first, second = root.iterfind("disks/disk")
    common = {"backup": "yes", "type": "file"}
    assert first.attrib == {
        **common, "name": "vda", "exportname": "vda", "backupmode": "incremental", "incremental": "old",
        "exportbitmap": "changed",
    }  # fmt: skip
    assert second.attrib == {**common, "name": "vd&b", "exportname": "vd&b", "backupmode": "full"}
    assert [scratch.get("file") for scratch in root.iter("scratch")] == ["/s/0", "/s/1"]
    assert domain_xml.job_socket(written) == "/s/<nbd>"
    assert domain_xml.job_socket("<domainbackup><server transport='tcp' name='h' port='1'/></domainbackup>") is None


def test_checkpoints() -> None:
    written = domain_xml.known_checkpoint("new", ["vda"], 7, DOMAIN)
    root = ElementTree.fromstring(written)
    assert (root.findtext("name"), root.findtext("creationTime")) == ("new", "7")
    assert domain_xml.checkpoint_images(written)["vda"] == "/images/a,b & c.qcow2"
    assert domain_xml.checkpoint_images(domain_xml.checkpoint("new", ["vda"])) == {}
    told = written.replace('bitmap="new"', 'bitmap="new" size="0"')
    assert domain_xml.checkpoint_disks(written) == {"vda": False}
    assert domain_xml.checkpoint_disks(told) == {"vda": True}
    assert domain_xml.checkpoint_disks("<c><disks><disk name='vda' checkpoint='no' size='1'/></disks></c>") == {}
