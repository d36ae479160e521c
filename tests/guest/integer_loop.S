# A loop of integer work with a known number of instructions, between '<' and '>' on COM1. Entered through PVH (32-bit, unpaged).
    .section .note.PVH, "a", @note
    .balign 4
    .long 4, 4, 18                  # sizes of name and description; XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start
    .text
    .code32
    .globl start
start:
    movw $0x3f8, %dx
    movb $'<', %al
    outb %al, %dx
    movl $ITERATIONS, %ecx
    xorl %eax, %eax
    movl $0x12345678, %ebx
    leal table, %esi
again:                              # 10 instructions a turn: arithmetic, a load, a store, a branch that is taken and one that isn't
    addl %ebx, %eax
    movl %eax, %edi
    shrl $7, %edi
    xorl %edi, %eax
    movl (%esi), %edi
    imull $3, %edi, %edi
    movl %edi, 4(%esi)
    cmpl $-1, %ecx
    je again
    loop again
    movw $0x3f8, %dx
    movb $'>', %al
    outb %al, %dx
    cli
halt:
    hlt
    jmp halt
    .bss                            # on a page of its own: the loop's stores are not stores to code
    .balign 4096
table:
    .skip 4096
