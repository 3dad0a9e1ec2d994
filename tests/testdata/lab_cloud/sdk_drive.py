"""Drives the simulated cloud with Alibaba's own SDK, unchanged.

Reads where the cloud is from the environment, asserts what the SDK's typed
answers say, prints one JSON line with what it has made.
"""
import json
import os
import sys
import time
import urllib.request

from alibabacloud_ecs20140526 import models as ecs
from alibabacloud_ecs20140526.client import Client as Ecs
from alibabacloud_tea_openapi.models import Config
from alibabacloud_tea_util.models import RuntimeOptions
from alibabacloud_vpc20160428 import models as vpc
from alibabacloud_vpc20160428.client import Client as Vpc
from Tea.exceptions import TeaException

REGION = "cn-hangzhou"
endpoint, ca, metadata = os.environ["LAB_ENDPOINT"], os.environ["LAB_CA"], os.environ["LAB_METADATA"]
runtime = RuntimeOptions(ca=ca, read_timeout=20000, connect_timeout=5000)


def config(**key):
    return Config(endpoint=endpoint, protocol="HTTPS", region_id=REGION, **key)


static = dict(access_key_id="k", access_key_secret="s")
client, vpcs = Ecs(config(**static)), Vpc(config(**static))


def refused(call, request):
    try:
        call(request, runtime)
    except TeaException as error:
        return error.code
    raise AssertionError("not refused")


# What there is.
answer = vpcs.describe_vswitches_with_options(vpc.DescribeVSwitchesRequest(region_id=REGION, v_switch_id="vsw-lab-a"), runtime)
switch = answer.body.v_switches.v_switch[0]
assert answer.body.total_count == 1 and switch.cidr_block == "10.0.0.0/20", switch
available = switch.available_ip_address_count
types = client.describe_instance_types_with_options(ecs.DescribeInstanceTypesRequest(instance_types=["ecs.g7.4xlarge"]), runtime)
kind = types.body.instance_types.instance_type[0]
assert (kind.eni_quantity, kind.eni_private_ip_address_quantity) == (8, 30), kind
assert kind.secondary_eni_queue_number == 8 and kind.memory_size == 64.0, kind

# Create, with everything an agent sends.
description = "a b+c*~/中文"
create = ecs.CreateNetworkInterfaceRequest(
    region_id=REGION, v_switch_id="vsw-lab-a", security_group_ids=["sg-lab"], instance_type="Secondary",
    secondary_private_ip_address_count=9, ipv_6address_count=2, description=description, client_token="tok-1",
    delete_on_release=True, source_dest_check=False,
    tag=[ecs.CreateNetworkInterfaceRequestTag(key="creator", value="fairway"), ecs.CreateNetworkInterfaceRequestTag(key="k2", value="v 2")],
)
made = client.create_network_interface_with_options(create, runtime).body
again = client.create_network_interface_with_options(create, runtime).body
eni = made.network_interface_id
assert eni == again.network_interface_id and made.request_id != again.request_id
assert made.status == "Available" and made.description == description and made.source_dest_check is False
assert len(made.private_ip_sets.private_ip_set) == 10 and made.private_ip_sets.private_ip_set[0].primary is True
assert len(made.ipv_6sets.ipv_6set) == 2 and len(made.tags.tag) == 2
create.secondary_private_ip_address_count = 8
assert refused(client.create_network_interface_with_options, create) == "IdempotentParameterMismatch"

# Attach is asynchronous.
attach = ecs.AttachNetworkInterfaceRequest(region_id=REGION, network_interface_id=eni, instance_id="i-1")
client.attach_network_interface_with_options(attach, runtime)
describe = ecs.DescribeNetworkInterfacesRequest(
    region_id=REGION, network_interface_id=[eni], max_results=500,
    tag=[ecs.DescribeNetworkInterfacesRequestTag(key="creator", value="fairway")],
)


def item():
    sets = client.describe_network_interfaces_with_options(describe, runtime).body.network_interface_sets
    return sets.network_interface_set[0]


def until(status):
    deadline = time.monotonic() + 20
    while item().status != status:
        assert time.monotonic() < deadline, item().status
        time.sleep(0.02)


assert item().status in ("Attaching", "InUse")
until("InUse")
seen = item()
assert seen.instance_id == "i-1" and seen.attachment.instance_id == "i-1" and seen.queue_number == 8
assert seen.delete_on_release is True and seen.type == "Secondary" and seen.mac_address == made.mac_address
assert refused(client.attach_network_interface_with_options, attach) == "InvalidOperation.InvalidEniState"
delete = ecs.DeleteNetworkInterfaceRequest(region_id=REGION, network_interface_id=eni)
assert refused(client.delete_network_interface_with_options, delete) == "InvalidOperation.InvalidEniState"

# Addresses of both families.
assign = ecs.AssignPrivateIpAddressesRequest(region_id=REGION, network_interface_id=eni, secondary_private_ip_address_count=20, client_token="tok-2")
four = client.assign_private_ip_addresses_with_options(assign, runtime).body.assigned_private_ip_addresses_set.private_ip_set.private_ip_address
assert len(four) == 20
assign.client_token, assign.secondary_private_ip_address_count = "tok-3", 1
assert refused(client.assign_private_ip_addresses_with_options, assign) == "InvalidOperation.Ipv4CountExceeded"
unassign = ecs.UnassignPrivateIpAddressesRequest(region_id=REGION, network_interface_id=eni, private_ip_address=four[:5])
client.unassign_private_ip_addresses_with_options(unassign, runtime)
six = client.assign_ipv_6addresses_with_options(
    ecs.AssignIpv6AddressesRequest(region_id=REGION, network_interface_id=eni, ipv_6address_count=3, client_token="tok-4"), runtime
).body.ipv_6sets.ipv_6address
assert len(six) == 3
client.unassign_ipv_6addresses_with_options(
    ecs.UnassignIpv6AddressesRequest(region_id=REGION, network_interface_id=eni, ipv_6address=six[:1]), runtime
)
seen = item()
assert (len(seen.private_ip_sets.private_ip_set), len(seen.ipv_6sets.ipv_6set)) == (25, 4)
attribute = client.describe_network_interface_attribute_with_options(
    ecs.DescribeNetworkInterfaceAttributeRequest(region_id=REGION, network_interface_id=eni), runtime
).body
assert attribute.network_interface_id == eni and len(attribute.private_ip_sets.private_ip_set) == 25
answer = vpcs.describe_vswitches_with_options(vpc.DescribeVSwitchesRequest(vpc_id="vpc-lab"), runtime)
left = next(s for s in answer.body.v_switches.v_switch if s.v_switch_id == "vsw-lab-a").available_ip_address_count
assert left == available - 25, (left, available)

# Pages.
ids, token, pages = [], None, 0
for _ in range(14):
    client.create_network_interface_with_options(
        ecs.CreateNetworkInterfaceRequest(region_id=REGION, v_switch_id="vsw-lab-b", security_group_id="sg-lab"), runtime)
while True:
    page = client.describe_network_interfaces_with_options(
        ecs.DescribeNetworkInterfacesRequest(region_id=REGION, max_results=10, next_token=token), runtime).body
    ids += [e.network_interface_id for e in page.network_interface_sets.network_interface_set]
    token, pages = page.next_token, pages + 1
    if not token:
        break
assert pages == 2 and len(ids) == len(set(ids)) == 16, (pages, ids)

# A role's temporary credentials, from the metadata service.
base = f"http://{metadata}/latest/meta-data/ram/security-credentials/"
role = urllib.request.urlopen(base).read().decode()
given = json.load(urllib.request.urlopen(base + role))
temporary = Ecs(config(access_key_id=given["AccessKeyId"], access_key_secret=given["AccessKeySecret"], security_token=given["SecurityToken"]))
assert temporary.describe_network_interfaces_with_options(describe, runtime).body.network_interface_sets.network_interface_set[0].network_interface_id == eni
wrong = Ecs(config(access_key_id="k", access_key_secret="wrong"))
assert refused(wrong.describe_network_interfaces_with_options, describe) == "SignatureDoesNotMatch"

# And back again.
client.detach_network_interface_with_options(
    ecs.DetachNetworkInterfaceRequest(region_id=REGION, network_interface_id=eni, instance_id="i-1"), runtime)
until("Available")
client.delete_network_interface_with_options(delete, runtime)
assert refused(client.delete_network_interface_with_options, delete) == "InvalidEniId.NotFound"
json.dump({"eni": eni, "enis": len(ids) - 1}, sys.stdout)
